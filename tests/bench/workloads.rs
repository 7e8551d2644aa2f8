//! The loads that are put on every path.

use mtls::results::{Per, Workload, workload};

use crate::args::Kind;

pub const WORKLOADS: [(Kind, Workload); 10] = [
    (Kind::Bulk, workload("bulk up, 1 stream", Per::Gigabyte, &["upload"])),
    (Kind::Bulk, workload("bulk down, 1 stream", Per::Gigabyte, &["download"])),
    (Kind::Bulk, workload("bulk up, 8 streams", Per::Gigabyte, &["upload", "--connections", "8"])),
    (Kind::Bulk, workload("bulk down, 8 streams", Per::Gigabyte, &["download", "--connections", "8"])),
    (Kind::Request, workload("requests, 1 connection", Per::Requests, &["request"])),
    (Kind::Request, workload("requests, 64 connections", Per::Requests, &["request", "--connections", "64"])),
    (
        Kind::Paced,
        workload(
            "1000 requests/s, 16 connections, 1 KiB",
            Per::Requests,
            &["paced", "--connections", "16", "--size", "1024", "--rate", "1000"],
        ),
    ),
    (
        Kind::Paced,
        workload(
            "3200 requests/s, 16 connections, 1 KiB",
            Per::Requests,
            &["paced", "--connections", "16", "--size", "1024", "--rate", "3200"],
        ),
    ),
    (Kind::Connect, workload("new connections, 1 at a time", Per::Connections, &["connect"])),
    (
        Kind::Connect,
        workload("new connections, 16 at a time", Per::Connections, &["connect", "--connections", "16"]),
    ),
];
