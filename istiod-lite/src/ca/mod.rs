//! The certificate authority: where its key comes from ([`source`]), which roots are trusted meanwhile ([`roots`]), what is
//! in force ([`CurrentAuthority`]) and who keeps it so ([`Keeper`]); who gets a certificate for which identity
//! ([`service`]), the certificate the control plane itself serves with ([`serving`]), and those of its callers
//! ([`clients`]).
//!
//! The key is read into memory and leaves the process only as the Secret that already holds it.

pub mod authority;
pub mod clients;
mod current;
mod keeper;
mod roots;
pub mod service;
pub mod serving;
mod source;

pub use authority::{Authority, LeafLifetime, SELF_SIGNED_ROOT_TTL};
pub use current::CurrentAuthority;
pub use keeper::{Keeper, Settings};
pub use source::SourceError;
