//! Library for programs that use an extlb device.
