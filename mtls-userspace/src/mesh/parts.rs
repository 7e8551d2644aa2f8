//! What snapshots are made of: objects in, the parts of a mesh out, those that nothing has changed shared with the
//! last one.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;

use super::hosts::Hosts;
use super::objects::{Concerned, Objects, duplicates};
use super::pod::Pods;
use super::server_calls::ServerCalls;
use super::service::Services;
use super::vip::Readiness;
use super::{Error, Mesh, Settings, Warning, Workload};
use crate::policy::Policies;

#[derive(Clone, Debug, Default)]
pub(super) struct Parts {
    pub workloads: Arc<Vec<Arc<Workload>>>,
    /// Of `workloads`, in their order; empty where slices say it.
    pub readiness: Arc<Vec<Readiness>>,
    pub starting: Arc<Vec<Arc<Workload>>>,
    pub by_address: Arc<HashMap<IpAddr, Arc<Workload>>>,
    pub services: Arc<Services>,
    pub hosts: Arc<Hosts>,
    pub policies: Arc<Policies>,
    pub calls: Arc<ServerCalls>,
    pub claims: Vec<Warning>,
    pub affinities: Vec<Warning>,
}

impl Parts {
    pub(super) fn mesh(&self, generation: u64) -> Mesh {
        Mesh {
            generation,
            workloads: self.workloads.clone(),
            starting: self.starting.clone(),
            policies: self.policies.clone(),
            by_address: self.by_address.clone(),
            services: self.services.clone(),
            hosts: self.hosts.clone(),
            server_calls: self.calls.clone(),
            warnings: self.claims.iter().chain(&self.affinities).cloned().collect(),
        }
    }

    /// The parts of these files' mesh, of which no other than those `concerned` differ from these.
    ///
    /// # Errors
    ///
    /// The first object that contradicts another, with the place it was read.
    pub(super) fn anew(
        &self,
        files: &mut [&mut Objects],
        concerned: Concerned,
        settings: &Settings,
    ) -> Result<Self, Error> {
        if let Some(error) = duplicates(files.iter().map(|file| &**file), concerned).into_iter().next() {
            return Err(error);
        }
        let mut parts = self.clone();
        if concerned.pods {
            let pods = Pods::settle(files)?;
            parts.workloads = Arc::new(pods.workloads);
            parts.readiness = Arc::new(pods.readiness);
            parts.starting = Arc::new(pods.starting);
            parts.by_address = Arc::new(pods.by_address);
            parts.claims = pods.claims;
        }
        if concerned.services || concerned.pods && parts.services.follow_pods() {
            let (services, warnings) = Services::settle(files, &parts.workloads, &parts.readiness)?;
            parts.services = Arc::new(services);
            parts.affinities = warnings;
        }
        if concerned.nodes {
            parts.hosts =
                Arc::new(Hosts::new(files.iter().flat_map(|file| &file.nodes).map(|it| &it.object)));
        }
        if concerned.policies || concerned.pods {
            let files = || files.iter().map(|file| &**file);
            parts.policies = Arc::new(Policies::new(
                files().flat_map(|file| &file.peer_authentications).map(|it| &it.object),
                files().flat_map(|file| &file.authorization_policies).map(|it| &it.object),
                &parts.workloads,
                &settings.root_namespace,
            ));
        }
        Ok(parts)
    }
}
