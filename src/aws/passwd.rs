//! s3fs's password file: `KEY:SECRET`, or `bucket:KEY:SECRET` for one bucket; `#` begins a comment.

use std::fs::Metadata;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use reqsign_aws_v4::Credential;

/// One usable line.
struct Line<'a> {
    bucket: Option<&'a str>,
    key: &'a str,
    secret: &'a str,
}

fn parse(text: &str) -> Result<Vec<Line<'_>>, usize> {
    let mut lines = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') || line.starts_with('[') {
            continue;
        }
        let fields: Vec<&str> = line.split(':').collect();
        let line = match fields.as_slice() {
            [key, secret] => Line { bucket: None, key, secret },
            [bucket, key, secret] => Line { bucket: Some(bucket), key, secret },
            _ => return Err(index + 1),
        };
        if line.key.is_empty() || line.secret.is_empty() {
            return Err(index + 1);
        }
        lines.push(line);
    }
    Ok(lines)
}

/// Reads the credentials for `bucket` (its own line before the general one).
///
/// # Errors
/// One line that names the file and the remedy: unreadable, open to others (as s3fs demands), no line that fits.
/// Never shows what the file holds.
pub fn read(path: &Path, bucket: Option<&str>) -> Result<Credential, String> {
    let shown = path.display();
    let metadata = std::fs::metadata(path).map_err(|error| format!("passwd_file {shown}: {error}; name a file that holds KEY:SECRET"))?;
    is_private("passwd_file", path, &metadata)?;
    let text =
        std::fs::read_to_string(path).map_err(|error| format!("passwd_file {shown}: {error}; make it readable for the user who mounts"))?;
    let lines = parse(&text).map_err(|number| format!("passwd_file {shown}, line {number}: not KEY:SECRET or bucket:KEY:SECRET"))?;
    let own = lines.iter().find(|line| line.bucket.is_some() && line.bucket == bucket);
    let line = own.or_else(|| lines.iter().find(|line| line.bucket.is_none()));
    let Some(line) = line else {
        return Err(format!("passwd_file {shown} has no line for this bucket; add KEY:SECRET"));
    };
    Ok(Credential { access_key_id: line.key.to_owned(), secret_access_key: line.secret.to_owned(), session_token: None, expires_in: None })
}

/// Refuses a file of keys that others can read.
///
/// # Errors
/// One line that names the option, the file and the remedy.
pub fn is_private(option: &str, path: &Path, metadata: &Metadata) -> Result<(), String> {
    let (mode, shown) = (metadata.permissions().mode() & 0o777, path.display());
    // s3fs allows group read for /etc/passwd-s3fs, which is shared by root's mounts; nobody may write or read as "other".
    if mode & 0o027 != 0 {
        return Err(format!("{option} {shown} can be read by others (mode {mode:03o}); run: chmod 600 {shown}"));
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::io::Write as _;

    fn file(text: &str, mode: u32) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(text.as_bytes()).unwrap();
        std::fs::set_permissions(file.path(), std::fs::Permissions::from_mode(mode)).unwrap();
        file
    }

    #[test]
    fn a_bucket_line_wins() {
        let file = file("# mine\nK1:S1\nphotos:K2:S2\n", 0o600);
        assert_eq!(read(file.path(), Some("photos")).unwrap().access_key_id, "K2");
        assert_eq!(read(file.path(), Some("other")).unwrap().secret_access_key, "S1");
        assert_eq!(read(file.path(), None).unwrap().access_key_id, "K1");
    }

    #[test]
    fn errors_name_the_file_and_keep_the_secret() {
        let open = file("K:TOPSECRET\n", 0o644);
        let error = read(open.path(), None).unwrap_err();
        assert!(error.contains("chmod 600") && error.contains(&open.path().display().to_string()));
        let broken = file("TOPSECRET\n", 0o600);
        let error = read(broken.path(), None).unwrap_err();
        assert!(error.contains("line 1") && !error.contains("TOPSECRET"));
        assert!(read(Path::new("/nonexistent/passwd"), None).unwrap_err().contains("/nonexistent/passwd"));
        assert!(read(file("b:K:S\n", 0o600).path(), Some("c")).unwrap_err().contains("no line"));
    }
}
