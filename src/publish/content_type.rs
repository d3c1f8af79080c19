//! Content-Type by the name of a key. A browser, an installer and a CDN go by it, so release files get the type that is
//! registered or that their tools look for; the rest is mime_guess's list.

/// What nobody knows: a browser saves it.
const UNKNOWN: &str = "application/octet-stream";
const TEXT: &str = "text/plain; charset=utf-8";
const GPG: &str = "application/pgp-signature";

/// Where mime_guess's list has nothing, an outdated type, or one that makes browsers do harm (Safari unpacks what it is
/// told is a zip: no wheel may say so). Registered types are IANA's, the others shared-mime-info's.
const BY_EXTENSION: &[(&str, &str)] = &[
    ("html", "text/html; charset=utf-8"),
    ("htm", "text/html; charset=utf-8"),
    ("js", "text/javascript; charset=utf-8"),
    ("mjs", "text/javascript; charset=utf-8"),
    ("cjs", "text/javascript; charset=utf-8"),
    ("map", "application/json"),
    ("webmanifest", "application/manifest+json"),
    ("jsonl", "application/jsonl"),
    ("wasm", "application/wasm"),
    ("yaml", "application/yaml"),
    ("yml", "application/yaml"),
    ("toml", "application/toml"),
    ("md", "text/markdown; charset=utf-8"),
    ("log", TEXT),
    ("sum", TEXT),
    ("md5", TEXT),
    ("sha1", TEXT),
    ("sha256", TEXT),
    ("sha512", TEXT),
    ("sha256sum", TEXT),
    ("sha512sum", TEXT),
    ("minisig", TEXT),
    ("asc", GPG),
    ("sig", GPG),
    ("deb", "application/vnd.debian.binary-package"),
    ("udeb", "application/vnd.debian.binary-package"),
    ("rpm", "application/x-rpm"),
    ("appimage", "application/vnd.appimage"),
    ("flatpak", "application/vnd.flatpak"),
    ("snap", "application/vnd.snap"),
    ("apk", "application/vnd.android.package-archive"),
    ("exe", "application/vnd.microsoft.portable-executable"),
    ("msi", "application/x-msi"),
    ("msix", "application/msix"),
    ("dmg", "application/x-apple-diskimage"),
    ("pkg", UNKNOWN),
    ("iso", "application/x-iso9660-image"),
    ("jar", "application/java-archive"),
    ("war", "application/java-archive"),
    ("whl", UNKNOWN),
    ("nupkg", UNKNOWN),
    ("vsix", UNKNOWN),
    ("gz", "application/gzip"),
    ("tgz", "application/gzip"),
    ("crate", "application/gzip"),
    ("bz2", "application/x-bzip2"),
    ("xz", "application/x-xz"),
    ("txz", "application/x-xz"),
    ("zst", "application/zstd"),
    ("tar", "application/x-tar"),
    ("7z", "application/x-7z-compressed"),
    ("m3u8", "application/vnd.apple.mpegurl"),
    ("mpd", "application/dash+xml"),
    ("ts", "video/mp2t"),
    ("m4s", "video/iso.segment"),
    ("avif", "image/avif"),
    ("torrent", "application/x-bittorrent"),
];

/// Files without an extension that a release has.
const BY_NAME: &[&str] = &[
    "README",
    "LICENSE",
    "COPYING",
    "NOTICE",
    "AUTHORS",
    "CHANGELOG",
    "MD5SUMS",
    "SHA1SUMS",
    "SHA256SUMS",
    "SHA512SUMS",
    "Release",
    "InRelease",
    "Packages",
];

/// The Content-Type of a key by its last component. Content-Encoding is nobody's guess: `.tar.gz` is a gzip file.
pub fn of_key(key: &str) -> String {
    if key.ends_with('/') {
        // How S3 consoles, s3fs and others mark a directory.
        return "application/x-directory".into();
    }
    let name = key.rsplit('/').next().unwrap_or(key);
    if BY_NAME.contains(&name) {
        return TEXT.into();
    }
    let Some((_, extension)) = name.rsplit_once('.') else { return UNKNOWN.into() };
    let extension = extension.to_ascii_lowercase();
    if let Some((_, known)) = BY_EXTENSION.iter().find(|(known, _)| *known == extension) {
        return (*known).into();
    }
    match mime_guess::from_ext(&extension).first_raw() {
        // S3 says nothing of the charset by itself, and browsers then guess.
        Some(text) if text.starts_with("text/") => format!("{text}; charset=utf-8"),
        Some(known) => known.into(),
        None => UNKNOWN.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn release_files_and_pages() {
        for (key, expected) in [
            ("index.html", "text/html; charset=utf-8"),
            ("a/STYLE.CSS", "text/css; charset=utf-8"),
            ("app.mjs", "text/javascript; charset=utf-8"),
            ("data.json", "application/json"),
            ("notes.txt", TEXT),
            ("x/packmule-1.0.tar.gz", "application/gzip"),
            ("packmule_1.0_amd64.deb", "application/vnd.debian.binary-package"),
            ("Packmule.AppImage", "application/vnd.appimage"),
            ("setup.exe", "application/vnd.microsoft.portable-executable"),
            ("a.whl", UNKNOWN),
            ("a.sha256", TEXT),
            ("a.tar.gz.asc", GPG),
            ("SHA256SUMS", TEXT),
            ("photo.JPG", "image/jpeg"),
            ("logo.svg", "image/svg+xml"),
            ("font.woff2", "font/woff2"),
            ("doc.pdf", "application/pdf"),
            ("archive.zip", "application/zip"),
            ("data.bin", UNKNOWN),
            ("noextension", UNKNOWN),
            ("strange.zzzz", UNKNOWN),
            (".html", "text/html; charset=utf-8"),
            ("dir/", "application/x-directory"),
            ("dir.html/file", UNKNOWN),
        ] {
            assert_eq!(of_key(key), expected, "{key}");
        }
    }

    #[test]
    fn the_lists_have_no_twins() {
        for (place, (extension, _)) in BY_EXTENSION.iter().enumerate() {
            assert!(BY_EXTENSION.iter().skip(place + 1).all(|(other, _)| other != extension), "{extension}");
            assert_eq!(*extension, extension.to_ascii_lowercase());
        }
    }
}
