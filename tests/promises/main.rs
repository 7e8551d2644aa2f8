//! What the product promises, one module per promise; and, first, that the lab itself would notice.

mod lab_itself;
