//! What the AWS CLI's config file says of a profile besides credentials and region, which the client reads itself: the
//! endpoint and the like. Weaker than everything of ours.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::layers::Environment;
use super::typed::Typed;
use super::{ConfigError, Origin};

/// Sections of an INI file by header, values with their lines; keys indented below `s3 =` are `s3.KEY`.
type Sections = BTreeMap<String, Section>;
type Section = BTreeMap<String, (String, usize)>;

/// Fills what nobody typed from the profile, and refuses a profile that is nowhere.
pub fn fill(typed: &mut Typed, environment: &Environment) -> Result<(), ConfigError> {
    let file = |variable: &str, name: &str| {
        let home = || environment.home.as_ref().map(|home| home.join(".aws").join(name));
        environment.get(variable).map(PathBuf::from).or_else(home).unwrap_or_default()
    };
    let config_file = file("AWS_CONFIG_FILE", "config");
    let config = read(&config_file);
    let name = typed.profile.as_deref().unwrap_or("default");
    // botocore: `[profile NAME]` or `[default]` in the config file, `[NAME]` in the credentials file.
    let section = config.get(&format!("profile {name}")).or_else(|| config.get(name).filter(|_| name == "default"));
    let Some(section) = section else {
        let credentials_file = typed.credentials_file.clone().unwrap_or_else(|| file("AWS_SHARED_CREDENTIALS_FILE", "credentials"));
        return match &typed.profile {
            Some(profile) if profile != "default" && !read(&credentials_file).contains_key(profile) => Err(ConfigError::new(format!(
                "profile={profile}: no such profile in {} or {}; add it or name another",
                config_file.display(),
                credentials_file.display()
            ))),
            _ => Ok(()),
        };
    };
    let services = section.get("services").and_then(|(services, _)| config.get(&format!("services {services}")));
    let ignore_endpoints = environment.get("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS") == Some("true");
    let mut profile = Typed::default();
    let mut take = |option: &str, value: Option<&(String, usize)>| match value {
        Some((value, line)) => profile.word(option, Some(value), &Origin::File(config_file.clone(), *line)).map(|()| true),
        None => Ok(false),
    };
    if !ignore_endpoints && !take("endpoint_url", services.and_then(|services| services.get("s3.endpoint_url")))? {
        take("endpoint_url", section.get("endpoint_url"))?;
    }
    take("ca_bundle", section.get("ca_bundle"))?;
    take("dual_stack", section.get("use_dualstack_endpoint"))?;
    if let Some((style, _)) = section.get("s3.addressing_style") {
        profile.path_style = match style.as_str() {
            "path" => Some(true),
            "virtual" => Some(false),
            _ => None,
        };
    }
    typed.endpoint_url = typed.endpoint_url.take().or(profile.endpoint_url);
    typed.ca_bundle = typed.ca_bundle.take().or(profile.ca_bundle);
    typed.dual_stack = typed.dual_stack.or(profile.dual_stack);
    typed.path_style = typed.path_style.or(profile.path_style);
    Ok(())
}

/// A file that is not there or may not be read says nothing.
fn read(path: &Path) -> Sections {
    std::fs::read_to_string(path).map(|text| sections(&text)).unwrap_or_default()
}

fn sections(text: &str) -> Sections {
    let mut sections = Sections::new();
    let mut header = String::new();
    let mut parent = String::new();
    for (line, number) in text.lines().zip(1..) {
        let bare = line.trim();
        if bare.is_empty() || bare.starts_with(['#', ';']) {
            continue;
        }
        if let Some(name) = bare.strip_prefix('[').and_then(|rest| rest.split_once(']')).map(|(name, _)| name) {
            header = name.split_whitespace().collect::<Vec<_>>().join(" ").replace(['"', '\''], "");
            sections.entry(header.clone()).or_default();
            continue;
        }
        let Some((key, value)) = bare.split_once('=').map(|(key, value)| (key.trim(), value.trim())) else { continue };
        let key = if line.starts_with([' ', '\t']) && !parent.is_empty() {
            format!("{parent}.{key}")
        } else {
            parent = if value.is_empty() { key.to_owned() } else { String::new() };
            key.to_owned()
        };
        sections.entry(header.clone()).or_default().insert(key, (value.to_owned(), number));
    }
    sections
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const CONFIG: &str = "[default]\ns3 =\n  addressing_style = virtual\n\n# a comment\n[profile release]\nregion=eu-west-1\nservices = local\ns3 =\n  addressing_style = path\nendpoint_url = http://127.0.0.1:1\n\n[services local]\ns3 =\n  endpoint_url = http://127.0.0.1:2\n";

    fn home() -> (tempfile::TempDir, Environment) {
        let home = tempfile::tempdir().unwrap();
        std::fs::create_dir(home.path().join(".aws")).unwrap();
        std::fs::write(home.path().join(".aws/config"), CONFIG).unwrap();
        std::fs::write(home.path().join(".aws/credentials"), "[keys]\naws_access_key_id = a\n").unwrap();
        let environment = Environment::isolated(home.path());
        (home, environment)
    }

    #[test]
    fn a_profile_fills_what_nobody_typed() {
        let (_home, mut environment) = home();
        let mut typed = Typed::default();
        fill(&mut typed, &environment).unwrap();
        assert_eq!(typed.path_style, Some(false));
        let mut typed = Typed { profile: Some("release".into()), path_style: Some(false), ..Typed::default() };
        fill(&mut typed, &environment).unwrap();
        assert_eq!(typed.path_style, Some(false), "what was typed stays");
        let mut typed = Typed { profile: Some("release".into()), ..Typed::default() };
        fill(&mut typed, &environment).unwrap();
        assert_eq!(typed.endpoint_url.unwrap().as_str(), "http://127.0.0.1:2/", "the service's endpoint before the profile's");
        assert_eq!(typed.path_style, Some(true));
        environment.variables.insert("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS".into(), "true".into());
        let mut typed = Typed { profile: Some("release".into()), ..Typed::default() };
        fill(&mut typed, &environment).unwrap();
        assert_eq!(typed.endpoint_url, None);
    }

    #[test]
    fn a_profile_that_is_nowhere_is_refused() {
        let (_home, environment) = home();
        let of = |profile: &str| fill(&mut Typed { profile: Some(profile.into()), ..Typed::default() }, &environment);
        of("keys").unwrap();
        of("default").unwrap();
        let message = of("relaese").unwrap_err().to_string();
        assert!(message.starts_with("profile=relaese: no such profile in "), "{message}");
    }
}
