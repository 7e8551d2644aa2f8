//! Two files of results side by side: records of both in, what changed and whether it is more than their spread out.

use super::record::Record;

/// How one figure changed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    Better,
    Worse,
    /// The repetitions of both overlap.
    Same,
    OnlyBefore,
    OnlyAfter,
}

impl Verdict {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Better => "better",
            Self::Worse => "WORSE",
            Self::Same => "same",
            Self::OnlyBefore => "only in A",
            Self::OnlyAfter => "only in B",
        }
    }
}

/// One figure of one path in both files.
#[derive(Clone, PartialEq, Debug, serde::Serialize)]
pub struct Difference {
    pub path: String,
    pub workload: String,
    pub metric: String,
    pub unit: String,
    pub before: Option<f64>,
    pub after: Option<f64>,
    /// After to before.
    pub ratio: Option<f64>,
    pub verdict: Verdict,
}

/// Every figure of either, those of `before` first and in its order.
pub fn differences(before: &[Record], after: &[Record]) -> Vec<Difference> {
    let same = |a: &Record, b: &Record| {
        (&a.path, &a.workload, &a.metric, &a.unit) == (&b.path, &b.workload, &b.metric, &b.unit)
    };
    let kept = before.iter().map(|a| difference(Some(a), after.iter().find(|b| same(a, b))));
    let new = after.iter().filter(|b| !before.iter().any(|a| same(a, b)));
    kept.chain(new.map(|b| difference(None, Some(b)))).flatten().collect()
}

fn difference(before: Option<&Record>, after: Option<&Record>) -> Option<Difference> {
    let named = before.or(after)?;
    let verdict = match (before, after) {
        (Some(a), Some(b)) => judge(a, b),
        (Some(_), None) => Verdict::OnlyBefore,
        _ => Verdict::OnlyAfter,
    };
    let [before, after] = [before, after].map(|record| record.map(|record| record.median));
    let ratio = before.zip(after).filter(|(a, _)| *a > 0.0).map(|(a, b)| b / a);
    Some(Difference {
        path: named.path.clone(),
        workload: named.workload.clone(),
        metric: named.metric.clone(),
        unit: named.unit.clone(),
        before,
        after,
        ratio,
        verdict,
    })
}

/// Only repetitions that lie wholly apart say anything.
fn judge(before: &Record, after: &Record) -> Verdict {
    let higher = match () {
        () if after.min > before.max => true,
        () if after.max < before.min => false,
        () => return Verdict::Same,
    };
    if higher == before.higher_is_better { Verdict::Better } else { Verdict::Worse }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::results::{Compared, Environment, QUANTILES, Results, THROUGHPUT};

    fn records(throughput: [f64; 3], latency: [f64; 3]) -> Vec<Record> {
        let mut results = Results::default();
        let path = Compared { path: "copy".into(), baseline: None };
        for (throughput, latency) in throughput.into_iter().zip(latency) {
            results.add(&path, "bulk", &vec![(THROUGHPUT, throughput), (QUANTILES[0], latency)], 0.0);
        }
        results.records(&Environment::default())
    }

    #[test]
    fn what_lies_apart_is_better_or_worse_by_what_the_metric_wants() {
        let base = || records([10.0, 11.0, 12.0], [50.0, 51.0, 52.0]);
        let cases = [
            ([20.0, 21.0, 22.0], [20.0, 21.0, 22.0], [Verdict::Better, Verdict::Better]),
            ([1.0, 2.0, 3.0], [90.0, 91.0, 92.0], [Verdict::Worse, Verdict::Worse]),
            ([12.0, 13.0, 14.0], [40.0, 45.0, 50.0], [Verdict::Same, Verdict::Same]),
            ([12.1, 13.0, 14.0], [52.1, 53.0, 54.0], [Verdict::Better, Verdict::Worse]),
        ];
        for (throughput, latency, expected) in cases {
            let found = differences(&base(), &records(throughput, latency));
            assert_eq!(found.iter().map(|found| found.verdict).collect::<Vec<_>>(), expected);
        }
        let found = differences(&base(), &records([22.0; 3], [51.0; 3]));
        assert_eq!((found[0].before, found[0].after, found[0].ratio), (Some(11.0), Some(22.0), Some(2.0)));
    }

    #[test]
    fn what_only_one_of_them_has_is_named() {
        let (some, none) = (records([1.0; 3], [1.0; 3]), Vec::new());
        let only = |a: &[Record], b: &[Record]| {
            differences(a, b).iter().map(|found| found.verdict).collect::<Vec<_>>()
        };
        assert_eq!(only(&some, &none), [Verdict::OnlyBefore; 2]);
        assert_eq!(only(&none, &some), [Verdict::OnlyAfter; 2]);
        assert_eq!(differences(&none, &none), []);
    }
}
