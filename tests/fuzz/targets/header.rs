//! A file's first bytes as a header. A header that was parsed must be the same after writing and reading it again.
//! Every value derived from it must be defined.

use qcow2::{FormatErrorKind, Header};

/// The input is the file.
pub fn judge(input: &[u8]) {
    let hint = Header::cluster_size_hint(&input[..input.len().min(Header::PREFIX_MAX)]);
    let parsed = Header::parse(input, input.len() as u64);
    if let Ok(header) = parsed {
        assert_eq!(hint, Ok(header.geometry().cluster_size()));
        follow(&header);
    }
}

/// The requirements on a header that was accepted.
pub fn follow(header: &Header) {
    let geometry = header.geometry();
    assert!(geometry.l1_entries() <= u64::from(header.l1_entries));
    let _ = (geometry.guest_clusters(), geometry.granule_size(), geometry.refblock_entries());
    let refusals = (header.unsupported(), header.write_refusal());
    let _ = format!("{refusals:?} {:?}", header.data_file_name());
    assert!(header.unsupported().is_some() || header.compression().is_some(), "a compression that is known");
    let bitmaps = header.bitmaps();
    assert_eq!(header.autoclear_kept(false) & header.autoclear_kept(true), header.autoclear_kept(false));
    assert!(bitmaps.is_none() || header.autoclear != 0);
    match header.encode() {
        Ok(bytes) => {
            assert!(bytes.len() as u64 <= geometry.cluster_size());
            let again = Header::parse(&bytes, bytes.len() as u64);
            assert_eq!(again.as_ref(), Ok(header), "what was written is read again");
        }
        Err(error) if Some(error) == header.damaged_extensions => {}
        // Pieces that were apart in the file, with gaps between, may not fit in the order in which we write them.
        Err(error) => assert!(matches!(error.kind, FormatErrorKind::HeaderFull { .. }), "{error}"),
    }
}
