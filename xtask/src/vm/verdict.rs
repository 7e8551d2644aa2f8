//! What a kernel was seen to do: lines of the guest's tests in, an account for people and for the README's table out.

use std::collections::BTreeMap;

use serde_json::Value;

/// One kernel's outcomes, in the order in which they came.
#[derive(Default)]
pub struct Seen {
    /// As `uname -r` has it.
    pub release: String,
    /// The case, and whether it passed.
    pub cases: Vec<(String, bool)>,
    /// What the agent can do without.
    pub optional: BTreeMap<String, bool>,
}

impl Seen {
    /// Takes a line of the console; what it says to a person is returned.
    pub fn note(&mut self, line: &str) -> String {
        let Ok(Value::Object(said)) = serde_json::from_str(line) else { return line.to_owned() };
        if let Some(release) = said.get("kernel").and_then(Value::as_str) {
            self.release = release.to_owned();
            return format!("Linux {release}");
        }
        if let Some(optional) = said.get("optional").and_then(Value::as_object) {
            let works = optional.iter().map(|(name, works)| (name.clone(), works == &Value::Bool(true)));
            self.optional.extend(works);
            let names = |wanted| {
                let names = self.optional.iter().filter(|(_, works)| **works == wanted);
                names.map(|(name, _)| name.as_str()).collect::<Vec<_>>().join(", ")
            };
            return format!("has {}\n   has not {}", names(true), names(false));
        }
        let text = |key| said.get(key).and_then(Value::as_str).unwrap_or_default();
        let (Some(passed), name) = (said.get("passed").and_then(Value::as_bool), text("case")) else {
            return line.to_owned();
        };
        self.cases.push((name.to_owned(), passed));
        let seconds = said.get("ms").and_then(Value::as_f64).unwrap_or_default() / 1000.0;
        format!("{} {name}: {} ({seconds:.1} s)", if passed { "ok    " } else { "FAILED" }, text("detail"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_console_is_understood_and_other_lines_are_kept() {
        let mut seen = Seen::default();
        seen.note(r#"{"kernel":"6.1.0"}"#);
        assert_eq!(seen.note("[ 1.0] something"), "[ 1.0] something");
        seen.note(r#"{"case":"a","passed":true,"detail":"d","ms":1500}"#);
        let failed = seen.note(r#"{"case":"b","passed":false,"detail":"why","ms":1}"#);
        assert!(failed.starts_with("FAILED b: why"), "{failed}");
        seen.note(r#"{"optional":{"x":true,"y":null}}"#);
        assert_eq!(seen.release, "6.1.0");
        assert_eq!(seen.cases, [("a".to_owned(), true), ("b".to_owned(), false)]);
        assert_eq!(seen.optional, [("x".to_owned(), true), ("y".to_owned(), false)].into());
    }
}
