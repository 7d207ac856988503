//! A [`Header`] to bytes: the fields, the extensions and the backing file's name, as at the start of the file.
//!
//! Owns their arrangement: extensions right after the header, then the end mark, then the name. To change one field of
//! a live image use a patch of [`position`](crate::position) instead, which is atomic.

use crate::error::{FormatError, FormatErrorKind, Structure};
use crate::extension::{END, FRAME_LENGTH};
use crate::geometry::Version;
use crate::header::{Header, MAGIC};
use crate::position;

impl Header {
    /// The header's bytes, to be written at offset 0; at most a cluster. Parsing them gives an equal header.
    ///
    /// # Errors
    /// If parsing would refuse the header because a value is out of range, or if it does not fit in a cluster.
    pub fn encode(&self) -> Result<Vec<u8>, FormatError> {
        self.validate()?;
        if let Some(damage) = self.damaged_extensions {
            // Extensions behind the damage would be lost.
            return Err(damage);
        }
        let extensions_length: usize =
            self.extensions.iter().map(|extension| extension.encoded_length()).sum();
        let extensions_end = self.header_length as usize + extensions_length;
        let name = self.backing_file.as_deref().unwrap_or_default();
        let room = 1_usize << self.cluster_bits;
        if extensions_end + name.len() > room {
            let kind = FormatErrorKind::HeaderFull {
                needed: (extensions_end + name.len()) as u64,
                room: room as u64,
            };
            return Err(FormatError::new(kind, Structure::Header, 0));
        }
        // Without room for the end mark there is no room for another extension either, so none is needed.
        let end_mark = extensions_end + FRAME_LENGTH + name.len() <= room;
        let name_offset = extensions_end + if end_mark { FRAME_LENGTH } else { 0 };

        let mut bytes = self.encode_fields(name_offset);
        for extension in &self.extensions {
            bytes.extend_from_slice(&extension.magic.to_be_bytes());
            // The cast is exact: the room is at most a cluster.
            bytes.extend_from_slice(&(extension.data.len() as u32).to_be_bytes());
            bytes.extend_from_slice(&extension.data);
            bytes.resize(bytes.len().next_multiple_of(8), 0);
        }
        if end_mark {
            bytes.extend_from_slice(&END.to_be_bytes());
            bytes.extend_from_slice(&0_u32.to_be_bytes());
        }
        bytes.extend_from_slice(name);
        Ok(bytes)
    }

    /// The bytes of the header without extensions, `header_length` of them.
    fn encode_fields(&self, name_offset: usize) -> Vec<u8> {
        let mut bytes = vec![0; self.header_length as usize];
        let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
        put(position::MAGIC, &MAGIC.to_be_bytes());
        put(position::VERSION, &self.version.number().to_be_bytes());
        if let Some(name) = &self.backing_file {
            put(position::BACKING_FILE_OFFSET, &(name_offset as u64).to_be_bytes());
            put(position::BACKING_FILE_LENGTH, &(name.len() as u32).to_be_bytes());
        }
        put(position::CLUSTER_BITS, &self.cluster_bits.to_be_bytes());
        put(position::SIZE, &self.size.to_be_bytes());
        put(position::CRYPT_METHOD, &self.crypt_method.to_be_bytes());
        put(position::L1_ENTRIES, &self.l1_entries.to_be_bytes());
        put(position::L1_OFFSET, &self.l1_offset.0.to_be_bytes());
        put(position::REFCOUNT_TABLE_OFFSET, &self.refcount_table_offset.0.to_be_bytes());
        put(position::REFCOUNT_TABLE_CLUSTERS, &self.refcount_table_clusters.to_be_bytes());
        put(position::SNAPSHOTS, &self.snapshots.to_be_bytes());
        put(position::SNAPSHOTS_OFFSET, &self.snapshots_offset.0.to_be_bytes());
        if self.version == Version::V3 {
            put(position::INCOMPATIBLE, &self.incompatible.0.to_be_bytes());
            put(position::COMPATIBLE, &self.compatible.to_be_bytes());
            put(position::AUTOCLEAR, &self.autoclear.to_be_bytes());
            put(position::REFCOUNT_ORDER, &self.refcount_order.to_be_bytes());
            put(position::HEADER_LENGTH, &self.header_length.to_be_bytes());
            if self.header_length as usize > position::COMPRESSION_TYPE {
                put(position::COMPRESSION_TYPE, &[self.compression_type]);
                put(position::COMPRESSION_TYPE + 1, &self.unknown_fields);
            }
        }
        bytes
    }
}
