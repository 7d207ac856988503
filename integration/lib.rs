//! Strata as real processes.
