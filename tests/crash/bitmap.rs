//! A persistent bitmap that every writer must keep up to date. Adds one to an image, and tells whether a crash
//! state has one that is marked up to date. The bits themselves are not checked.

use std::path::Path;

use qcow2::feature::AUTOCLEAR_BITMAPS;
use qcow2::{Bitmap, BitmapDirectory, Extension, Header, extension};
use storage_sim::Image;

use super::hidden::Making;
use super::shape::TOP;

/// The bitmap's entry in the directory (spec: "Bitmap directory"), whose table of one entry is at `table`.
fn entry(table: u64) -> Vec<u8> {
    let mut entry = vec![0; 24];
    entry[..8].copy_from_slice(&table.to_be_bytes());
    entry[8..12].copy_from_slice(&1u32.to_be_bytes());
    // Enabled; the dirty tracking type; 64 KiB per bit; a name of one byte.
    (entry[15], entry[16], entry[17], entry[19]) = (2, 1, 16, 1);
    entry.extend(b"b");
    entry.resize(entry.len().next_multiple_of(8), 0);
    entry
}

/// Adds a bitmap to the top image, which must be intact and closed.
pub fn add(image: &Image) -> Image {
    let mut making = Making::of(image);
    // The bitmap is all zero, without a cluster for its bits.
    let table = making.append(&[0; 8]);
    let directory = entry(table);
    let at = making.append(&directory);
    let data = [&1u32.to_be_bytes()[..], &[0; 4], &(directory.len() as u64).to_be_bytes(), &at.to_be_bytes()];
    let mut header = making.header.clone();
    header.extensions.push(Extension { magic: extension::BITMAPS, data: data.concat() });
    header.autoclear |= AUTOCLEAR_BITMAPS;
    making.put(0, &header.encode().expect("room in the header"));
    image.with(Path::new(TOP), 0, &making.bytes)
}

/// True if a program that supports bitmaps would trust a bitmap of this image.
pub fn is_trusted(image: &Image, header: &Header) -> bool {
    let Some(bitmaps) = header.bitmaps() else { return false };
    let contents = image.file(Path::new(TOP)).expect("the image");
    let mut directory = BitmapDirectory::new(&bitmaps, header.geometry(), contents.length());
    let mut list: Vec<Bitmap> = Vec::new();
    while let Some(qcow2::HostRange { offset: at, length }) = directory.next_piece() {
        let mut bytes = vec![0; length as usize];
        contents.read(at.0, &mut bytes);
        directory.feed(&bytes, |bitmap| list.push(bitmap));
    }
    !directory.is_broken() && list.iter().any(|bitmap| bitmap.is_auto() && !bitmap.is_in_use())
}
