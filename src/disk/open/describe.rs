//! Describes images without serving them: the contents of their headers, also of images that need unsupported
//! features.
//!
//! Owns the walk down a chain for that. It writes nothing. If a part of an image is broken, the other parts are still
//! described.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use qcow2::{Bitmap, Snapshot, Unsupported};
use storage::{FileIdentity, Storage};

use crate::error::OpenError;
use crate::image::image_file::{ImageFile, Sharing};
use crate::layer::Layer;
use crate::open::backing::{LayerFile, backing_of};
use crate::open::chain::CHAIN_LAYERS_MAX;
use crate::open::raw::raw_layer;
use crate::options::{DiskOptions, Format};
use crate::runtime::driver::Driver;

/// Operations in flight: reads go one by one.
const QUEUE_DEPTH: u32 = 8;

/// An image of a chain.
#[derive(Debug)]
pub struct LayerDescription {
    /// Its file, header and size.
    pub layer: Layer,
    /// Bytes that the host has allocated for the file.
    pub allocated: u64,
    /// The feature because of which it cannot be served.
    pub unsupported: Option<Unsupported>,
    /// Its persistent bitmaps; an error if their directory cannot be read.
    pub bitmaps: Result<Vec<Bitmap>, OpenError>,
    /// Its internal snapshots; an error if their table cannot be read.
    pub snapshots: Result<Vec<Snapshot>, OpenError>,
    /// The path of its backing file; none also if its name is not accepted and the chain is not followed.
    pub backing: Option<PathBuf>,
}

/// Describes the image at `path`, and with `whole_chain` every backing file below it. Nothing is written. Of the
/// options, the formats, `direct` and `lock_timeout` matter. The files stay open, and locked, as long as the storage
/// lives.
///
/// # Errors
/// If a file cannot be opened or read, a header is broken, or the name of a backing file is not accepted.
pub fn describe<S: Storage>(
    storage: &S,
    path: &Path,
    options: &DiskOptions,
    sharing: Sharing,
    whole_chain: bool,
) -> Result<Vec<LayerDescription>, OpenError> {
    let driver = Driver::new(storage.queue(QUEUE_DEPTH)?);
    let mut layers: Vec<LayerDescription> = Vec::new();
    let mut seen = HashSet::new();
    let mut next = Some(LayerFile { path: path.to_path_buf(), format: options.format, recorded: false });
    while let Some(at) = next {
        let described = describe_one(&driver, storage, &at, options, sharing, &mut seen);
        let described = driver.block_on(described).and_then(|mut layer| {
            let named = match &layer.layer.header {
                Some(header) => backing_of(&at.path, header, options.backing_format),
                None => Ok(None),
            };
            // A name that is not accepted matters only if the walk continues there.
            let named = if whole_chain { named? } else { named.unwrap_or(None) };
            layer.backing = named.as_ref().map(|file| file.path.clone());
            Ok((layer, named))
        });
        match described {
            Ok((layer, named)) => {
                layers.push(layer);
                next = named.filter(|_| whole_chain);
            }
            Err(error) if layers.is_empty() => return Err(error),
            Err(source) => {
                let chain = layers.into_iter().map(|above| above.layer.path).chain([at.path]).collect();
                return Err(OpenError::Backing { chain, recorded: at.recorded, source: Box::new(source) });
            }
        }
    }
    Ok(layers)
}

async fn describe_one<S: Storage>(
    driver: &Driver<S::Queue>,
    storage: &S,
    file: &LayerFile,
    options: &DiskOptions,
    sharing: Sharing,
    seen: &mut HashSet<FileIdentity>,
) -> Result<LayerDescription, OpenError> {
    if seen.len() >= CHAIN_LAYERS_MAX {
        return Err(OpenError::ChainTooDeep { path: file.path.clone(), limit: CHAIN_LAYERS_MAX });
    }
    let (id, info) = sharing.open(storage, &file.path, options)?;
    if !seen.insert(info.identity) {
        return Err(OpenError::BackingLoop { path: file.path.clone() });
    }
    let image = ImageFile { driver, id, info: &info };
    let (layer, unsupported, bitmaps, snapshots) = match file.format {
        Format::Raw => (raw_layer(&file.path, &info), None, Ok(Vec::new()), Ok(Vec::new())),
        Format::Qcow2 => {
            let header = image.header(info.length).await?;
            let bitmaps = image.bitmaps(&header).await.map(Option::unwrap_or_default);
            let unsupported = header.unsupported();
            let snapshots = image.snapshots(&header).await;
            (Layer::qcow2(file.path.clone(), header, info.length), unsupported, bitmaps, snapshots)
        }
    };
    Ok(LayerDescription {
        layer,
        allocated: storage.allocated(id)?,
        unsupported,
        bitmaps,
        snapshots,
        backing: None,
    })
}
