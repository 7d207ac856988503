//! The options for image locks, shared by every command that opens an image.

use std::time::Duration;

use clap::Args;
use storage::host::HostStorage;

/// The longest `--lock-timeout` in seconds: a day.
const TIMEOUT_S_MAX: f64 = 86_400.0;

/// How to treat the locks of images.
#[derive(Clone, Debug, Args)]
pub struct LockArgs {
    /// How long to wait for an image that another program uses, in seconds. 0 does not wait [default: 5 for serve,
    /// 0.5 for the other commands]
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    pub lock_timeout: Option<Duration>,

    /// Use an image without a lock where the file system's lock service does not answer (ENOLCK); make sure that no
    /// other program uses the image
    #[arg(long)]
    pub allow_unlocked: bool,
}

impl LockArgs {
    /// The time to wait.
    pub fn timeout(&self, default: Duration) -> Duration {
        self.lock_timeout.unwrap_or(default)
    }

    /// A storage that treats locks as the options say.
    pub fn storage(&self) -> HostStorage {
        HostStorage::new().unlocked_allowed(self.allow_unlocked)
    }
}

fn seconds(text: &str) -> Result<Duration, String> {
    let number = text.parse::<f64>().ok().filter(|number| (0.0..=TIMEOUT_S_MAX).contains(number));
    number
        .map(Duration::from_secs_f64)
        .ok_or_else(|| "a time from 0 to 86400 seconds, such as 0.5".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_seconds() {
        assert_eq!(seconds("0"), Ok(Duration::ZERO));
        assert_eq!(seconds("0.25"), Ok(Duration::from_millis(250)));
        for wrong in ["", "-1", "1e9", "NaN", "inf", "5s"] {
            assert!(seconds(wrong).is_err(), "{wrong}");
        }
    }
}
