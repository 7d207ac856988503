//! Sizes in bytes, as people write and read them.

use std::str::FromStr;

/// A size in bytes, written with an optional suffix: K, M, G or T for powers of 1024.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Size(pub u64);

/// Why a text is not a size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SizeError {
    /// Not digits and one suffix.
    #[error("a size is a whole number of bytes, or one with the suffix K, M, G or T (powers of 1024)")]
    Syntax,
    /// More than 2^64 - 1 bytes.
    #[error("the size is too large")]
    TooLarge,
}

impl FromStr for Size {
    type Err = SizeError;

    fn from_str(text: &str) -> Result<Self, SizeError> {
        let digits = text.trim_end_matches(|last: char| !last.is_ascii_digit());
        let shift = match &text[digits.len()..] {
            "" | "B" => 0,
            "K" | "k" | "KiB" => 10,
            "M" | "m" | "MiB" => 20,
            "G" | "g" | "GiB" => 30,
            "T" | "t" | "TiB" => 40,
            _ => return Err(SizeError::Syntax),
        };
        // `parse` would accept a sign.
        if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
            return Err(SizeError::Syntax);
        }
        let number: u64 = digits.parse().map_err(|_| SizeError::TooLarge)?;
        number.checked_mul(1 << shift).map(Size).ok_or(SizeError::TooLarge)
    }
}

/// A size in bytes, or a change of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SizeChange {
    /// Written without a sign.
    To(Size),
    /// Written with a `+`.
    More(Size),
    /// Written with a `-`.
    Less(Size),
}

impl FromStr for SizeChange {
    type Err = SizeError;

    fn from_str(text: &str) -> Result<Self, SizeError> {
        if let Some(more) = text.strip_prefix('+') {
            return more.parse().map(SizeChange::More);
        }
        match text.strip_prefix('-') {
            Some(less) => less.parse().map(SizeChange::Less),
            None => text.parse().map(SizeChange::To),
        }
    }
}

/// A number of bytes for people: `10 GiB (10737418240 bytes)`.
pub fn in_words(bytes: u64) -> String {
    let short = short(bytes);
    if bytes < 1024 { short } else { format!("{short} ({bytes} bytes)") }
}

/// A number of bytes in at most four digits and a unit.
pub fn short(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if bytes < 1024 {
        return format!("{bytes} bytes");
    }
    // The unit in which the number is at least 1 and below 1024.
    let power = (63 - bytes.leading_zeros()) / 10;
    let unit = 1u64 << (10 * power);
    let name = UNITS[power as usize - 1];
    if bytes.is_multiple_of(unit) {
        return format!("{} {name}", bytes / unit);
    }
    format!("{:.2} {name}", bytes as f64 / unit as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read() {
        let read = |text: &str| text.parse::<Size>().map(|size| size.0);
        assert_eq!(read("0"), Ok(0));
        assert_eq!(read("4096"), Ok(4096));
        assert_eq!(read("3B"), Ok(3));
        assert_eq!(read("512k"), Ok(512 << 10));
        assert_eq!(read("32M"), Ok(32 << 20));
        assert_eq!(read("32MiB"), Ok(32 << 20));
        assert_eq!(read("2G"), Ok(2 << 30));
        assert_eq!(read("1t"), Ok(1 << 40));
        for wrong in ["", "M", "-1", "+1", " 1", "1 ", "1.5G", "0x10", "1MB", "1Mi", "1E", "1G1", "１K", "1µ"]
        {
            assert_eq!(read(wrong), Err(SizeError::Syntax), "{wrong:?}");
        }
        for large in ["18446744073709551616", "16777216T", "99999999999999999999G"] {
            assert_eq!(read(large), Err(SizeError::TooLarge), "{large:?}");
        }
        assert_eq!(read("16777215T"), Ok(16_777_215 << 40));
    }

    #[test]
    fn a_sign_makes_a_change() {
        assert_eq!("+1G".parse(), Ok(SizeChange::More(Size(1 << 30))));
        assert_eq!("-512".parse(), Ok(SizeChange::Less(Size(512))));
        assert_eq!("3M".parse(), Ok(SizeChange::To(Size(3 << 20))));
        for wrong in ["+", "-", "++1", "+-1", "- 1", "--shrink"] {
            assert_eq!(wrong.parse::<SizeChange>(), Err(SizeError::Syntax), "{wrong:?}");
        }
    }

    #[test]
    fn sizes_are_told() {
        assert_eq!(in_words(0), "0 bytes");
        assert_eq!(in_words(1023), "1023 bytes");
        assert_eq!(in_words(1024), "1 KiB (1024 bytes)");
        assert_eq!(in_words(1536), "1.50 KiB (1536 bytes)");
        assert_eq!(short(10 << 30), "10 GiB");
        assert_eq!(short((1 << 20) + (1 << 18)), "1.25 MiB");
        assert_eq!(short(u64::MAX), "16.00 EiB");
    }
}
