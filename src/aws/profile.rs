//! What the credential chain leaves in `~/.aws/config`: a profile's region and the role that it assumes.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

/// One profile's settings, from the config file and the credentials file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Profile {
    /// `region`.
    pub region: Option<String>,
    /// `role_arn`.
    pub role_arn: Option<String>,
    /// `source_profile`: whose credentials assume the role.
    pub source_profile: Option<String>,
    /// `credential_source`: `Environment`, `Ec2InstanceMetadata` or `EcsContainer`.
    pub credential_source: Option<String>,
    /// `external_id`.
    pub external_id: Option<String>,
    /// `role_session_name`.
    pub role_session_name: Option<String>,
    /// `web_identity_token_file`: the role is then assumed with that token, not with keys.
    pub web_identity_token_file: Option<String>,
}

/// All sections of AWS's two files by profile name.
#[derive(Clone, Debug, Default)]
pub struct Profiles {
    sections: HashMap<String, HashMap<String, String>>,
}

/// Where the files are, after the environment (`AWS_CONFIG_FILE`, `AWS_SHARED_CREDENTIALS_FILE`).
pub fn paths(credentials_file: Option<&Path>) -> Vec<PathBuf> {
    let home = std::env::var_os("HOME").map(PathBuf::from);
    let from = |variable: &str, name: &str| {
        std::env::var_os(variable).map(PathBuf::from).or_else(|| home.as_ref().map(|home| home.join(".aws").join(name)))
    };
    let credentials = credentials_file.map(Path::to_path_buf).or_else(|| from("AWS_SHARED_CREDENTIALS_FILE", "credentials"));
    from("AWS_CONFIG_FILE", "config").into_iter().chain(credentials).collect()
}

impl Profiles {
    /// Reads the files that exist; one that cannot be read counts as empty (the chain says what is missing).
    pub fn load(paths: &[PathBuf]) -> Self {
        let mut profiles = Self::default();
        for path in paths {
            if let Ok(text) = std::fs::read_to_string(path) {
                profiles.merge(&text);
            }
        }
        profiles
    }

    fn merge(&mut self, text: &str) {
        let mut section = String::new();
        for line in text.lines() {
            // An indented line belongs to a nested setting (`s3 =`), which is nobody's here.
            let nested = line.starts_with([' ', '\t']);
            let line = line.trim();
            if line.is_empty() || line.starts_with(['#', ';']) || nested {
                continue;
            }
            if let Some(name) = line.strip_prefix('[').and_then(|rest| rest.split(']').next()) {
                let name = name.trim();
                name.strip_prefix("profile ").unwrap_or(name).trim().clone_into(&mut section);
            } else if let Some((key, value)) = line.split_once('=') {
                self.sections.entry(section.clone()).or_default().insert(key.trim().to_ascii_lowercase(), value.trim().to_owned());
            }
        }
    }

    /// The names that have a section, in their order.
    pub fn names(&self) -> Vec<&str> {
        let mut names: Vec<&str> = self.sections.keys().map(String::as_str).filter(|name| !name.contains(' ')).collect();
        names.sort_unstable();
        names
    }

    /// True when the name has a section.
    pub fn contains(&self, name: &str) -> bool {
        self.sections.contains_key(name)
    }

    /// One profile; absent ones are empty.
    pub fn get(&self, name: &str) -> Profile {
        let empty = HashMap::new();
        let section = self.sections.get(name).unwrap_or(&empty);
        let value = |key: &str| section.get(key).filter(|value| !value.is_empty()).cloned();
        Profile {
            region: value("region"),
            role_arn: value("role_arn"),
            source_profile: value("source_profile"),
            credential_source: value("credential_source"),
            external_id: value("external_id"),
            role_session_name: value("role_session_name"),
            web_identity_token_file: value("web_identity_token_file"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_files_give_one_profile() {
        let mut profiles = Profiles::default();
        profiles.merge("[default]\nregion=eu-west-1\ns3 =\n  region = nested\n[profile release]\nrole_arn = arn:aws:iam::1:role/x\nsource_profile=default\n");
        profiles.merge("[release]\nregion = us-west-2\n");
        assert_eq!(profiles.get("default").region.as_deref(), Some("eu-west-1"));
        let release = profiles.get("release");
        assert_eq!(release.role_arn.as_deref(), Some("arn:aws:iam::1:role/x"));
        assert_eq!(release.region.as_deref(), Some("us-west-2"));
        assert_eq!(profiles.get("none"), Profile::default());
        assert!(profiles.contains("release") && !profiles.contains("none"));
    }
}
