//! The `sk_lookup` program, loaded once for each netns.
//!
//! aya reads the kernel's whole type information for each object it loads: tens of milliseconds and megabytes for a
//! program that needs none of it. A node has hundreds of pods, so here the object is parsed once; for each netns its
//! constants are written, the instructions pointed at the maps, and the result goes straight to bpf(2).

use std::{
    collections::HashMap,
    io,
    os::fd::{AsRawFd, OwnedFd},
};

use aya_obj::{EbpfSectionKind, Map, Object};

use crate::{
    LoadError, NetnsCookie, OBJECT,
    kernel::{self, Instructions, open_pin},
    pins::Pins,
};

/// The program; not named like its section, see there.
pub(crate) const STEER: &str = "steer";
const COOKIE: &str = "NETNS_COOKIE";

/// The parsed program and the maps it shares with all others.
pub(crate) struct Steer {
    object: Object,
    shared: Vec<(String, OwnedFd)>,
}

impl Steer {
    /// Parses the embedded object. The pinned maps must exist.
    pub(crate) fn parse(pins: &Pins) -> Result<Steer, LoadError> {
        let mut object = Object::parse(OBJECT).map_err(|error| LoadError::rejected(STEER, error))?;
        let mut shared = Vec::new();
        for (name, map) in &object.maps {
            if is_constant(map) {
                continue;
            }
            let fd = open_pin(&pins.map(name)).and_then(|fd| fd.ok_or_else(|| io::ErrorKind::NotFound.into()));
            shared.push((name.clone(), fd.map_err(|source| LoadError::io(format!("opening map {name}"), source))?));
        }
        // The hooks' code is not needed here, and every relocation would walk through it.
        object.programs.retain(|name, _| name == STEER);
        let steer = object.programs.get(STEER).ok_or_else(absent)?.function_key();
        object.functions.retain(|key, _| *key == steer);
        Ok(Steer { object, shared })
    }

    /// Gives the program for one netns to the verifier.
    pub(crate) fn load(&self, cookie: NetnsCookie) -> Result<OwnedFd, LoadError> {
        let mut object = self.object.clone();
        let value = cookie.0.to_ne_bytes();
        object
            .patch_map_data(HashMap::from([(COOKIE, (value.as_slice(), true))]))
            .map_err(|error| LoadError::rejected(STEER, error))?;
        // The descriptors must stay open until the program holds its maps.
        let mut constants = Vec::new();
        for (name, map) in object.maps.iter().filter(|(_, map)| is_constant(map)) {
            let fd = kernel::constant_map(map.data())
                .map_err(|source| LoadError::io(format!("making the constants {name} of program {STEER}"), source))?;
            constants.push((name.clone(), fd));
        }
        let maps = std::mem::take(&mut object.maps);
        let numbered = self
            .shared
            .iter()
            .chain(&constants)
            .filter_map(|(name, fd)| Some((name.as_str(), fd.as_raw_fd(), maps.get(name)?)));
        let text = object.functions.keys().map(|(section, _)| *section).collect();
        object.relocate_maps(numbered, &text).map_err(|error| LoadError::rejected(STEER, error))?;
        object.relocate_calls(&text).map_err(|error| LoadError::rejected(STEER, error))?;
        let key = object.programs.get(STEER).ok_or_else(absent)?.function_key();
        let function = object.functions.get(&key).ok_or_else(absent)?;
        kernel::load_sk_lookup(STEER, Instructions(&function.instructions), &object.license)
            .map_err(|error| LoadError::rejected(STEER, error))
    }
}

fn is_constant(map: &Map) -> bool {
    matches!(map.section_kind(), EbpfSectionKind::Rodata | EbpfSectionKind::Data | EbpfSectionKind::Bss)
}

fn absent() -> LoadError {
    LoadError::Program { program: STEER.to_owned(), source: "not in the embedded object".into() }
}
