//! A whole driver in user space, over any [`Hardware`](crate::hardware::Hardware).
//!
//! It owns the device: context table, device page tables, invalidation queue and page request ring
//! are in memory that it allocates and maps. What a program registers is mapped (and thereby
//! locked) until it is taken back, in the order of the rule: device ptes cleared, translations
//! invalidated, in-flight accesses drained, acknowledged; only then is the mapping taken from the
//! bus, and only then may the memory be used for something else.
