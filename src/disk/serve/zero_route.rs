//! How ranges of a disk are zeroed and discarded: one choice for each disk, made at open.

use engine::ZeroMode;

use crate::layer::Layer;
use crate::rules;

/// How ranges of a disk are zeroed and discarded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ZeroRoute {
    /// The top image is raw: by the host's operations on its file.
    Raw,
    /// The data is in an external file that can be read as a raw image: by the host's operations on that file. The
    /// tables that lead to it may stay as they are.
    RawView,
    /// By the tables. The data is in an external file, where every cluster keeps its location: the whole range is
    /// emptied there afterwards.
    DataFile,
    /// By the tables. Clusters keep their location, and each is emptied before the claim on it ends.
    KeptPlace,
    /// By the tables alone: freed clusters go into quarantine.
    Tables,
}

impl ZeroRoute {
    /// The route of a disk with this top image. `keeps_place`: discarded clusters are to keep their location.
    pub fn of(top: &Layer, has_data_file: bool, keeps_place: bool) -> Self {
        let Some(header) = &top.header else { return ZeroRoute::Raw };
        let is_raw_view = rules::is_raw_view(header.is_data_file_raw());
        match (has_data_file, keeps_place) {
            _ if is_raw_view => ZeroRoute::RawView,
            (true, _) => ZeroRoute::DataFile,
            (false, true) => ZeroRoute::KeptPlace,
            (false, false) => ZeroRoute::Tables,
        }
    }

    /// True if the host's operations on the data do it, and not the tables.
    pub fn is_raw(self) -> bool {
        matches!(self, ZeroRoute::Raw | ZeroRoute::RawView)
    }

    /// True if nothing is to be done but a change of tables in memory.
    pub fn needs_only_tables(self, mode: ZeroMode) -> bool {
        match self {
            ZeroRoute::Raw | ZeroRoute::RawView => false,
            ZeroRoute::DataFile | ZeroRoute::KeptPlace => mode == ZeroMode::Keep,
            ZeroRoute::Tables => true,
        }
    }
}
