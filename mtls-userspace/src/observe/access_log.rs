//! The access log: one line per connection that ended or was refused, written by a thread of its own.
//!
//! The data path only moves a pointer into a bounded queue. When the queue is full the line is lost, counted, and the
//! log says so itself. It never blocks a connection, and control characters never reach the output unescaped.

use std::fmt::Write as _;
use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::thread;
use std::time::Duration;

use jiff::Timestamp;
use serde_json::Value;

use super::connections::Open;
use super::flow::{Ending, Flow, Party, Refusal};

/// In what form lines are written.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, clap::ValueEnum, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AccessLog {
    #[default]
    Off,
    /// `key=value` pairs; `-` stands for what is not known.
    Text,
    /// One object per line; `null` stands for what is not known.
    Json,
}

const QUEUE: usize = 8192;
/// The writer lets lines gather for so long, so that a busy data path does not wake it for every one.
const GATHER: Duration = Duration::from_millis(10);

#[derive(Debug)]
pub(super) enum Record {
    Ended {
        at: Timestamp,
        open: Arc<Open>,
        duration: Duration,
        ending: Ending,
    },
    Refused {
        at: Timestamp,
        flow: Box<Flow>,
        refusal: Refusal,
    },
    /// Answered once everything before it is written.
    Flush(SyncSender<()>),
}

#[derive(Debug)]
pub(super) struct Log {
    queue: Option<SyncSender<Record>>,
    lost: Arc<AtomicU64>,
}

impl Log {
    pub fn start(form: AccessLog, out: Box<dyn Write + Send>) -> Self {
        let lost = Arc::new(AtomicU64::new(0));
        if form == AccessLog::Off {
            return Self { queue: None, lost };
        }
        let (queue, records) = mpsc::sync_channel(QUEUE);
        let writer = Writer { form, out, lost: lost.clone(), told: 0, failing: false };
        match thread::Builder::new().name("access-log".to_owned()).spawn(move || writer.run(&records)) {
            Ok(_) => Self { queue: Some(queue), lost },
            Err(error) => {
                tracing::error!(%error, "no access log: the system gives no thread for its writer");
                Self { queue: None, lost }
            }
        }
    }

    pub fn is_on(&self) -> bool {
        self.queue.is_some()
    }

    pub fn write(&self, record: Record) {
        if let Some(queue) = &self.queue
            && queue.try_send(record).is_err()
        {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
    }

    pub fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }

    /// Waits until what was logged so far is written, at most so long. False if it was not.
    pub fn flush(&self, patience: Duration) -> bool {
        let Some(queue) = &self.queue else { return true };
        let (done, wait) = mpsc::sync_channel(1);
        let deadline = std::time::Instant::now() + patience;
        let mut flush = Record::Flush(done);
        while let Err(mpsc::TrySendError::Full(back)) = queue.try_send(flush) {
            if std::time::Instant::now() >= deadline {
                return false;
            }
            flush = back;
            thread::sleep(Duration::from_millis(1));
        }
        wait.recv_timeout(deadline.saturating_duration_since(std::time::Instant::now())).is_ok()
    }
}

struct Writer {
    form: AccessLog,
    out: Box<dyn Write + Send>,
    lost: Arc<AtomicU64>,
    /// How many of the lost lines the log has mentioned.
    told: u64,
    failing: bool,
}

impl Writer {
    fn run(mut self, records: &Receiver<Record>) {
        let mut lines = String::new();
        while let Ok(record) = records.recv() {
            let mut waiting = self.take(record, &mut lines);
            if waiting.is_none() {
                thread::sleep(GATHER);
            }
            while waiting.is_none() && lines.len() < 256 * 1024 {
                let Ok(record) = records.try_recv() else { break };
                waiting = self.take(record, &mut lines);
            }
            self.write(&mut lines);
            if let Some(done) = waiting {
                let _ = done.send(());
            }
        }
    }

    /// Appends the record's line, or returns whom to tell that all before is written.
    fn take(&mut self, record: Record, lines: &mut String) -> Option<SyncSender<()>> {
        let fields = match &record {
            Record::Flush(done) => return Some(done.clone()),
            Record::Ended { at, open, duration, ending } => fields(
                *at,
                &open.flow,
                open.records(),
                (open.progress.sent(), open.progress.received()),
                *duration,
                ending.as_str(),
                ending.reason(),
            ),
            Record::Refused { at, flow, refusal } => {
                fields(*at, flow, None, (0, 0), Duration::ZERO, "refused", Some(refusal.to_string()))
            }
        };
        self.line(&fields, lines);
        None
    }

    fn write(&mut self, lines: &mut String) {
        let lost = self.lost.load(Ordering::Relaxed);
        if lost > self.told {
            let note = [
                ("time", Value::from(rfc3339(Timestamp::now()))),
                ("access_log_lines_lost", Value::from(lost - self.told)),
            ];
            self.line(&note, lines);
            self.told = lost;
        }
        if lines.is_empty() {
            return;
        }
        let written = self.out.write_all(lines.as_bytes()).and_then(|()| self.out.flush());
        if let Err(error) = &written {
            let count = lines.bytes().filter(|byte| *byte == b'\n').count() as u64;
            self.lost.fetch_add(count, Ordering::Relaxed);
            if !self.failing {
                tracing::warn!(%error, "access-log lines cannot be written; they are lost until it can be again");
            }
        }
        self.failing = written.is_err();
        lines.clear();
    }

    fn line(&self, fields: &[(&'static str, Value)], lines: &mut String) {
        match self.form {
            AccessLog::Json => {
                for (position, (name, value)) in fields.iter().enumerate() {
                    let _ = write!(lines, "{}\"{name}\":", if position == 0 { '{' } else { ',' });
                    push_json(value, lines);
                }
                lines.push_str("}\n");
            }
            AccessLog::Text | AccessLog::Off => {
                for (position, (name, value)) in fields.iter().enumerate() {
                    let _ = write!(lines, "{}{name}=", if position == 0 { "" } else { " " });
                    match value {
                        Value::Null => lines.push('-'),
                        Value::String(text) if is_bare(text) => lines.push_str(text),
                        value => push_json(value, lines),
                    }
                }
                lines.push('\n');
            }
        }
    }
}

/// JSON, with the control characters escaped that JSON itself leaves alone and a terminal obeys.
fn push_json(value: &Value, lines: &mut String) {
    for c in value.to_string().chars() {
        if c.is_control() {
            let _ = write!(lines, "\\u{:04x}", u32::from(c));
        } else {
            lines.push(c);
        }
    }
}

fn is_bare(text: &str) -> bool {
    !text.is_empty()
        && text != "-"
        && text.bytes().all(|byte| byte.is_ascii_graphic() && !b"\"=\\".contains(&byte))
}

fn fields(
    at: Timestamp,
    flow: &Flow,
    records: Option<&'static str>,
    (sent, received): (u64, u64),
    duration: Duration,
    ending: &str,
    reason: Option<String>,
) -> [(&'static str, Value); 18] {
    let workload = |party: &Party| party.workload.as_ref().map(|workload| workload.key());
    let identity = |party: &Party| party.identity.as_ref().map(ToString::to_string);
    [
        ("time", rfc3339(at).into()),
        ("direction", flow.direction.as_str().into()),
        ("path", flow.path.as_str().into()),
        ("source_address", flow.original_src.to_string().into()),
        ("source_workload", workload(&flow.source).into()),
        ("source_identity", identity(&flow.source).into()),
        ("destination_address", flow.address.to_string().into()),
        ("original_destination", flow.original_dst.map(|dst| dst.to_string()).into()),
        ("destination_workload", workload(&flow.destination).into()),
        ("destination_identity", identity(&flow.destination).into()),
        ("service", flow.service.as_deref().into()),
        ("cipher", flow.cipher.into()),
        ("records", records.into()),
        ("bytes_sent", sent.into()),
        ("bytes_received", received.into()),
        ("duration_ms", u64::try_from(duration.as_millis()).unwrap_or(u64::MAX).into()),
        ("ending", ending.into()),
        ("reason", reason.into()),
    ]
}

fn rfc3339(at: Timestamp) -> String {
    format!("{at:.3}")
}
