//! The life of a server in its pair: sessions, roles, epochs, going alone and coming back.

pub mod api;
