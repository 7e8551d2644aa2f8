//! What a PromQL query asks for: metrics with the labels they are selected by, and the labels it groups by.
//!
//! Reads only what promtool has found to be PromQL, and so much of it as is needed to name names.

use std::collections::BTreeSet;

#[derive(Debug, Default, PartialEq, Eq)]
pub struct Query {
    pub selectors: Vec<Selector>,
    /// After `by`, `on` and their kin.
    pub grouping: BTreeSet<String>,
}

#[derive(Debug, PartialEq, Eq)]
pub struct Selector {
    pub metric: String,
    pub labels: BTreeSet<String>,
}

#[derive(Debug, PartialEq, Eq)]
enum Token {
    Name(String),
    Mark(char),
}

const GROUPING: [&str; 6] = ["by", "without", "on", "ignoring", "group_left", "group_right"];
const OPERATORS: [&str; 6] = ["and", "or", "unless", "bool", "offset", "atan2"];

impl Query {
    pub fn read(text: &str) -> Self {
        let tokens = tokens(text);
        let mut query = Self::default();
        let mut rest = tokens.as_slice();
        while let Some((token, after)) = rest.split_first() {
            rest = after;
            let Token::Name(name) = token else { continue };
            let opens = |mark| after.first() == Some(&Token::Mark(mark));
            if GROUPING.contains(&name.as_str()) {
                if opens('(') {
                    let (labels, after) = names_until(')', after);
                    query.grouping.extend(labels);
                    rest = after;
                }
            } else if !OPERATORS.contains(&name.as_str()) && !opens('(') && !groups(after) {
                let (labels, after) = if opens('{') { names_until('}', after) } else { Default::default() };
                if opens('{') {
                    rest = after;
                }
                query.selectors.push(Selector { metric: name.clone(), labels });
            }
        }
        query
    }
}

/// Whether an aggregation's grouping follows its name.
fn groups(after: &[Token]) -> bool {
    matches!(after.first(), Some(Token::Name(name)) if name == "by" || name == "without")
}

fn names_until(end: char, tokens: &[Token]) -> (BTreeSet<String>, &[Token]) {
    let at = tokens.iter().position(|token| *token == Token::Mark(end)).unwrap_or(tokens.len() - 1);
    let names = tokens[..at].iter().filter_map(|token| match token {
        Token::Name(name) => Some(name.clone()),
        Token::Mark(_) => None,
    });
    (names.collect(), &tokens[at + 1..])
}

/// Names and marks; strings, numbers and ranges are left out.
fn tokens(text: &str) -> Vec<Token> {
    let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == ':';
    let mut tokens = Vec::new();
    let mut rest = text;
    while let Some(c) = rest.chars().next() {
        let length = match c {
            '"' | '\'' => string(rest, c),
            '[' => rest.find(']').map_or(rest.len(), |end| end + 1),
            c if c.is_ascii_digit() => rest.find(|c| !is_name(c) && c != '.').unwrap_or(rest.len()),
            c if is_name(c) => {
                let end = rest.find(|c| !is_name(c)).unwrap_or(rest.len());
                tokens.push(Token::Name(rest[..end].to_owned()));
                end
            }
            c => {
                if !c.is_whitespace() {
                    tokens.push(Token::Mark(c));
                }
                c.len_utf8()
            }
        };
        rest = &rest[length..];
    }
    tokens
}

/// The length of a string with its quotes.
fn string(text: &str, quote: char) -> usize {
    let mut escaped = false;
    for (at, c) in text.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            c if c == quote => return at + 1,
            _ => {}
        }
    }
    text.len()
}

#[test]
fn metrics_and_labels_are_found() {
    let selector = |metric: &str, labels: &[&str]| Selector {
        metric: metric.into(),
        labels: labels.iter().map(|label| (*label).to_owned()).collect(),
    };
    let query = Query::read(
        "sum by (a, b) (rate(x_total{c=\"y{z}\\\"\", d=~'q'}[5m:1m] offset 5m)) / on (e) group_left (f) max(w) > bool 0.5\n\
         unless (topk(3, v{}) or avg without (g) (u)) and time() - 2 * 86400 < 1e9",
    );
    assert_eq!(
        query.selectors,
        [selector("x_total", &["c", "d"]), selector("w", &[]), selector("v", &[]), selector("u", &[])]
    );
    assert_eq!(query.grouping, ["a", "b", "e", "f", "g"].map(str::to_owned).into());
}
