//! A strict reader of what a scraper reads. Anything a scraper would stumble over fails the test.

use std::collections::{BTreeMap, HashMap};

pub type Labels = BTreeMap<String, String>;

pub struct Samples {
    samples: Vec<(String, Labels, f64)>,
}

impl Samples {
    pub fn parse_open_metrics(text: &str) -> Self {
        let body = text.strip_suffix("# EOF\n").expect("OpenMetrics ends with # EOF");
        Self::parse(body, "_total")
    }

    pub fn parse_text(text: &str) -> Self {
        assert!(!text.contains("# EOF"));
        Self::parse(text, "")
    }

    /// `counter_suffix`: what a counter's samples have beyond the name of their family.
    fn parse(text: &str, counter_suffix: &str) -> Self {
        let mut kinds: HashMap<&str, &str> = HashMap::new();
        let mut helped = Vec::new();
        let mut current = String::new();
        let mut samples: Vec<(String, Labels, f64)> = Vec::new();
        for line in text.lines() {
            if let Some(help) = line.strip_prefix("# HELP ") {
                helped.push(help.split_once(' ').expect("help has a text").0);
            } else if let Some(kind) = line.strip_prefix("# TYPE ") {
                let (name, kind) = kind.split_once(' ').unwrap();
                assert!(kinds.insert(name, kind).is_none(), "family {name} appears twice");
                assert_eq!(helped.last(), Some(&name), "{name} has no help");
                let suffix = if kind == "counter" { counter_suffix } else { "" };
                current = format!("{name}{suffix}");
            } else {
                let (name, labels, value) = sample(line);
                assert_eq!(name, current, "a sample outside its family: {line}");
                let twice = samples.iter().any(|(other, others, _)| *other == name && *others == labels);
                assert!(!twice, "a label set appears twice: {line}");
                samples.push((name, labels, value));
            }
        }
        Self { samples }
    }

    /// The samples of a name whose labels include these.
    pub fn of<'a>(&'a self, name: &'a str, labels: &'a [(&str, &str)]) -> Vec<(&'a Labels, f64)> {
        let matching = self.samples.iter().filter(move |(other, have, _)| {
            other == name
                && labels.iter().all(|(key, value)| have.get(*key).is_some_and(|have| have == value))
        });
        matching.map(|(_, labels, value)| (labels, *value)).collect()
    }

    /// The value of the one sample that has these labels.
    #[track_caller]
    pub fn one(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        let found = self.of(name, labels);
        assert_eq!(found.len(), 1, "{name} {labels:?}: {found:?}");
        found[0].1
    }

    #[track_caller]
    pub fn none(&self, name: &str, labels: &[(&str, &str)]) {
        let found = self.of(name, labels);
        assert!(found.is_empty(), "{name} {labels:?}: {found:?}");
    }

    pub fn sum(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        self.of(name, labels).iter().map(|(_, value)| value).sum()
    }
}

fn sample(line: &str) -> (String, Labels, f64) {
    let Some((name, rest)) = line.split_once('{') else {
        let (name, value) = line.split_once(' ').unwrap();
        return (metric_name(name), Labels::new(), value.parse().unwrap());
    };
    let mut labels = Labels::new();
    let mut rest = rest;
    loop {
        let (key, after) = rest.split_once("=\"").unwrap_or_else(|| panic!("no label in {line}"));
        let (value, after) = label_value(after);
        assert!(labels.insert(metric_name(key), value).is_none(), "label {key} twice in {line}");
        match after.split_at(1) {
            (",", after) => rest = after,
            ("}", after) => {
                return (metric_name(name), labels, after.strip_prefix(' ').unwrap().parse().unwrap());
            }
            _ => panic!("what follows a label in {line}"),
        }
    }
}

fn metric_name(name: &str) -> String {
    assert!(name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_'), "name {name:?}");
    name.to_owned()
}

/// The unescaped value and what follows its closing quote.
fn label_value(text: &str) -> (String, &str) {
    let mut value = String::new();
    let mut chars = text.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => return (value, &text[at + 1..]),
            '\\' => match chars.next().unwrap().1 {
                'n' => value.push('\n'),
                c @ ('"' | '\\') => value.push(c),
                c => panic!("escape {c:?}"),
            },
            c => value.push(c),
        }
    }
    panic!("a label value without end: {text}")
}
