//! What measurements become: figures in; records with medians and ratios, a table, a page and a difference out.
//!
//! `mtls lab compare` and the project's own benchmark share it. It measures nothing and judges nothing: a record says what
//! was seen, where, and how far the repetitions lay apart.

mod difference;
mod metric;
mod page;
mod progress;
mod record;
mod table;

pub use difference::{Difference, Verdict, differences};
pub use metric::{
    CONNECTIONS, FIRST_BYTE, Figures, Metric, Per, QUANTILES, REQUESTS, THROUGHPUT, TRANSACTIONS, Workload,
    workload,
};
pub use page::{Key, Page};
pub use progress::{Progress, clock, number};
pub use record::{Compared, Environment, Missing, Record, Recorded, Results, median};
pub use table::{distinct, table};
