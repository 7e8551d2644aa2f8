//! How the rooms' errors are called in the access log and in metrics: one name for each, in one place.
