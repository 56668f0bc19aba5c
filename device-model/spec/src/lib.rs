//! Registers and memory formats of the extlb device.
#![no_std]
#![forbid(unsafe_code)]
