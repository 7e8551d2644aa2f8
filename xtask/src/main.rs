//! Development commands: setup, build, demo, test.
fn main() {}
