//! The area of header extensions, behind a valid header.

use qcow2::{Geometry, Header, NewImage, Version, extension};

use super::header::follow;
use super::values::Values;

/// The input: the header's properties, then the area.
pub fn judge(input: &[u8]) {
    let mut values = Values(input);
    let how = values.u8();
    let version = if how & 1 == 0 { Version::V3 } else { Version::V2 };
    let cluster_bits = 9 + u32::from(how >> 4) % 8;
    let geometry = Geometry { version, cluster_bits, refcount_order: 4, extended_l2: false, size: 1 << 20 };
    let mut image = NewImage::new(geometry);
    if how & 2 != 0 {
        image.backing_file = Some(b"base".to_vec());
    }
    let mut file = image.layout().expect("a geometry that the format allows").swap_remove(0).1;
    if how & 4 != 0 && version == Version::V3 {
        // Makes bitmaps valid.
        file[qcow2::position::AUTOCLEAR + 7] |= 1;
    }
    let at = Header::parse(&file, file.len() as u64).expect("a header that is right").header_length as usize;
    let room = file.len() - at;
    let area = values.bytes(room);
    file[at..at + area.len()].copy_from_slice(area);
    let Ok(header) = Header::parse(&file, file.len() as u64) else { return };
    let bytes: usize = header.extensions.iter().map(|extension| extension.encoded_length()).sum();
    assert!(bytes <= room.next_multiple_of(8), "no more extensions than there is room for");
    for found in &header.extensions {
        assert_ne!(found.magic, extension::END);
        assert!(found.data.is_empty() || file.windows(found.data.len()).any(|part| part == found.data));
    }
    follow(&header);
}
