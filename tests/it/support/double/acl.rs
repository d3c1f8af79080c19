//! Access control lists of objects.

use s3s::dto::*;
use s3s::{S3Result, s3_error};

use super::s3::Memory;

/// The canonical id of who owns everything here.
pub const OWNER: &str = "0000000000000000000000000000000000000000000000000000000000000001";
/// Everybody.
pub const ALL_USERS: &str = "http://acs.amazonaws.com/groups/global/AllUsers";

/// What a request grants: permission, and the header's word for it.
pub type Asked = [(&'static str, Option<String>); 4];

/// The grant headers of a request.
macro_rules! asked_grants {
    ($input:expr) => {
        [
            ("FULL_CONTROL", $input.grant_full_control.take()),
            ("READ", $input.grant_read.take()),
            ("READ_ACP", $input.grant_read_acp.take()),
            ("WRITE_ACP", $input.grant_write_acp.take()),
        ]
    };
}
pub(super) use asked_grants;

/// The grants of a new object beside its owner's own. ACLs are off, as in every bucket made since April 2023, unless the double has them on:
/// then only the owner's own is taken.
pub fn grants(memory: &Memory, canned: Option<&ObjectCannedACL>, asked: Asked) -> S3Result<Vec<(String, String)>> {
    let canned = canned.map(ObjectCannedACL::as_str);
    let asks = asked.iter().any(|(_, grantees)| grantees.is_some());
    if canned.is_some() && asks {
        return Err(s3_error!(InvalidRequest, "Specifying both Canned ACLs and Header Grants is not allowed"));
    }
    if !memory.options.acls && (asks || canned.is_some_and(|canned| canned != "bucket-owner-full-control")) {
        return Err(s3_error!(AccessControlListNotSupported, "The bucket does not allow ACLs"));
    }
    let mut grants = Vec::new();
    if canned == Some("public-read") {
        grants.push(("READ".to_owned(), ALL_USERS.to_owned()));
    }
    for (permission, grantees) in asked {
        for grantee in grantees.iter().flat_map(|grantees| grantees.split(',')) {
            let (_, who) = grantee.trim().split_once('=').ok_or_else(|| s3_error!(InvalidArgument, "Argument format not recognized"))?;
            let who = who.trim_matches('"').to_owned();
            if who != OWNER {
                grants.push((permission.to_owned(), who));
            }
        }
    }
    Ok(grants)
}

/// GetObjectAcl's answer.
pub fn policy(grants: &[(String, String)]) -> GetObjectAclOutput {
    let grant = |permission: &str, who: &str| {
        let is_group = who.starts_with("http");
        let kind = if is_group { "Group" } else { "CanonicalUser" };
        let (id, uri) = if is_group { (None, Some(who.to_owned())) } else { (Some(who.to_owned()), None) };
        let grantee = Grantee { display_name: None, email_address: None, id, type_: Type::from(kind.to_owned()), uri };
        Grant { grantee: Some(grantee), permission: Some(Permission::from(permission.to_owned())) }
    };
    let own = std::iter::once(grant("FULL_CONTROL", OWNER));
    GetObjectAclOutput {
        grants: Some(own.chain(grants.iter().map(|(permission, who)| grant(permission, who))).collect()),
        owner: Some(Owner { display_name: None, id: Some(OWNER.to_owned()) }),
        ..GetObjectAclOutput::default()
    }
}
