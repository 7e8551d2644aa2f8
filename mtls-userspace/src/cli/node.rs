//! `mtls node`: the agent.

use anyhow::Context;

use crate::config::Options;
use crate::node;

/// Flags of `mtls node`.
#[derive(clap::Args)]
pub struct Node {
    #[command(flatten)]
    options: Options,
}

impl Node {
    pub fn run(self) -> anyhow::Result<()> {
        let config = self.options.validate()?;
        super::log_to_stderr();
        super::forbid_core_dumps()?;
        super::allow_open_files()?;
        tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("control")
            .enable_all()
            .build()
            .context("control runtime")?
            .block_on(node::run(config))
    }
}
