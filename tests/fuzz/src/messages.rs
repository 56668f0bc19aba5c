//! Bytes that a client of the server sends: messages of vfio-user, whole, broken and out of order.
//!
//! What must hold is checked where the messages are handled (`fuzz_messages`): each is answered
//! once, by a reply of the length that it says, or with an error that is one; nobody panics.

/// Runs an input.
pub fn run(data: &[u8]) {
    extlb_device::server::fuzz_messages(data);
}
