//! What a process gives back of its memory: none of it is its own, and there is one on each node, or beside each API.

mod calls;
mod heap;

pub use calls::{give_back_code, give_back_memory};
pub use heap::Heap;
