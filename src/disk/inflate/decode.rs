//! Inflates one compressed cluster. The decoder trusts no claim of a stream. It decodes straight into a buffer of the
//! cluster's size, and allocates nothing by a stream's claims.

use flate2::{Decompress, FlushDecompress};
use qcow2::Compression;
use thiserror::Error;
use zstd::zstd_safe::{DCtx, find_frame_compressed_size};

/// Why the data of a compressed cluster cannot be inflated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum InflateError {
    /// The data is not a stream of its kind.
    #[error("the compressed data is damaged")]
    Damaged,
    /// The stream, or the data, ends too early.
    #[error("the compressed data ends after {bytes} bytes of the cluster")]
    Short {
        /// Bytes that were inflated.
        bytes: usize,
    },
    /// A thread ended before the cluster was inflated.
    #[error("inflating was broken off")]
    BrokenOff,
}

/// Inflates clusters, and retains its memory between them.
#[derive(Default)]
pub(crate) struct Decoder {
    deflate: Option<Decompress>,
    zstd: Option<DCtx<'static>>,
}

impl Decoder {
    /// Fills `output`, a whole cluster, from data that begins with a stream and may have anything after it.
    pub fn inflate(
        &mut self,
        compression: Compression,
        data: &[u8],
        output: &mut [u8],
    ) -> Result<(), InflateError> {
        match compression {
            Compression::Deflate => self.deflate(data, output),
            Compression::Zstd => self.zstd(data, output),
        }
    }

    /// As in QEMU, a stream that continues after the cluster is full is valid: its rest is ignored. Writers use a
    /// window of 4 KiB. A longer one does no harm, as the whole cluster is in memory.
    fn deflate(&mut self, data: &[u8], output: &mut [u8]) -> Result<(), InflateError> {
        let decoder = self.deflate.get_or_insert_with(|| Decompress::new(false));
        decoder.reset(false);
        decoder.decompress(data, output, FlushDecompress::Finish).map_err(|_| InflateError::Damaged)?;
        let bytes = decoder.total_out() as usize;
        if bytes == output.len() { Ok(()) } else { Err(InflateError::Short { bytes }) }
    }

    /// As in QEMU, there may be several frames, and the last must end exactly where the cluster does. Each frame is
    /// decoded in one call, which needs no window, whatever the frame claims.
    fn zstd(&mut self, data: &[u8], output: &mut [u8]) -> Result<(), InflateError> {
        let decoder = self.zstd.get_or_insert_with(DCtx::create);
        let (mut data, mut done) = (data, 0);
        while done < output.len() {
            if data.is_empty() {
                return Err(InflateError::Short { bytes: done });
            }
            let length = find_frame_compressed_size(data).map_err(|_| InflateError::Damaged)?;
            let (frame, rest) = data.split_at_checked(length).ok_or(InflateError::Damaged)?;
            done += decoder.decompress(&mut output[done..], frame).map_err(|_| InflateError::Damaged)?;
            data = rest;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use flate2::Compression as Level;
    use flate2::write::DeflateEncoder;
    use storage_sim::Random;

    use super::*;

    const SIZE: usize = 65536;

    /// Bytes that repeat at a distance of 20,000, and no shorter one.
    fn contents() -> Vec<u8> {
        let mut random = Random::new(1);
        let unit: Vec<u8> = (0..20_000).map(|_| random.next_bits() as u8).collect();
        unit.iter().copied().cycle().take(SIZE).collect()
    }

    fn deflated(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = DeflateEncoder::new(Vec::new(), Level::best());
        encoder.write_all(bytes).expect("to memory");
        encoder.finish().expect("to memory")
    }

    fn zstd(bytes: &[u8]) -> Vec<u8> {
        zstd::bulk::compress(bytes, 3).expect("to memory")
    }

    fn inflate(compression: Compression, data: &[u8]) -> Result<Vec<u8>, InflateError> {
        let mut output = vec![0xee; SIZE];
        // Twice, because a decoder is used again after any result.
        let mut decoder = Decoder::default();
        let first = decoder.inflate(compression, data, &mut output);
        assert_eq!(decoder.inflate(compression, data, &mut output), first);
        first.map(|()| output)
    }

    #[test]
    fn deflate_streams_with_any_window_and_anything_behind() {
        let mut data = deflated(&contents());
        assert!(data.len() < SIZE / 2, "it has matches farther back than 4 KiB");
        assert_eq!(inflate(Compression::Deflate, &data), Ok(contents()));
        data.extend([0xa5; 300]);
        assert_eq!(inflate(Compression::Deflate, &data), Ok(contents()));
    }

    #[test]
    fn a_deflate_stream_may_be_longer_but_not_shorter_than_the_cluster() {
        let long = [contents(), vec![7; 100_000]].concat();
        assert_eq!(inflate(Compression::Deflate, &deflated(&long)), Ok(contents()));
        let short = deflated(&contents()[..SIZE - 1]);
        assert_eq!(inflate(Compression::Deflate, &short), Err(InflateError::Short { bytes: SIZE - 1 }));
        let whole = deflated(&contents());
        for cut in [0, 1, 100, whole.len() / 2, whole.len() - 20] {
            let result = inflate(Compression::Deflate, &whole[..cut]);
            assert!(matches!(result, Err(InflateError::Short { bytes }) if bytes < SIZE), "{cut}");
        }
        assert_eq!(inflate(Compression::Deflate, &[0; 4096]), Err(InflateError::Damaged));
    }

    #[test]
    fn zstd_frames_that_fill_the_cluster_exactly() {
        let all = contents();
        assert_eq!(inflate(Compression::Zstd, &zstd(&all)), Ok(all.clone()));
        let skippable = [0x50, 0x2a, 0x4d, 0x18, 3, 0, 0, 0, 1, 2, 3];
        let frames =
            [zstd(&all[..1000]), skippable.to_vec(), zstd(&[]), zstd(&all[1000..]), vec![0xa5; 300]].concat();
        assert_eq!(inflate(Compression::Zstd, &frames), Ok(all.clone()));
        let long = [&all[..], b"more"].concat();
        assert_eq!(inflate(Compression::Zstd, &zstd(&long)), Err(InflateError::Damaged));
        let short = zstd(&all[..SIZE - 1]);
        assert_eq!(inflate(Compression::Zstd, &short), Err(InflateError::Short { bytes: SIZE - 1 }));
        let whole = zstd(&all);
        for cut in [1, 5, 100, whole.len() - 1] {
            assert_eq!(inflate(Compression::Zstd, &whole[..cut]), Err(InflateError::Damaged), "{cut}");
        }
        assert_eq!(inflate(Compression::Zstd, &[0; 4096]), Err(InflateError::Damaged));
    }

    #[test]
    fn a_frame_with_a_large_window_needs_no_memory_for_it() {
        let mut encoder = zstd::stream::write::Encoder::new(Vec::new(), 3).expect("an encoder");
        // 2 GiB, far past what streaming decoders allow by default.
        encoder.window_log(31).expect("the format knows it");
        encoder.write_all(&contents()).expect("to memory");
        let data = encoder.finish().expect("to memory");
        assert_eq!(inflate(Compression::Zstd, &data), Ok(contents()));
    }

    #[test]
    fn damage_is_found_or_changes_only_bytes() {
        for (compression, data) in
            [(Compression::Deflate, deflated(&contents())), (Compression::Zstd, zstd(&contents()))]
        {
            for at in (0..data.len()).step_by(7) {
                let mut data = data.clone();
                data[at] ^= 0x55;
                if let Ok(bytes) = inflate(compression, &data) {
                    assert_eq!(bytes.len(), SIZE);
                }
            }
        }
    }
}
