//! Access control lists, where a bucket has them on: a server-side copy carries none over, so that what grants rights to the source is
//! sent with it again.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use http::Method;

use super::bucket::Bucket;
use super::operation::Operation;
use super::request::Call;
use super::xml::Element;
use super::{ErrorKind, Result, S3Error};

/// Who has which rights to an object, as the headers that grant them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Acl {
    /// Grantees by header; none where the owner alone has rights, which a new object's owner has anyway.
    grants: BTreeMap<&'static str, String>,
}

impl Acl {
    /// Of an `AccessControlPolicy`, GetObjectAcl's answer.
    fn of(policy: &Element) -> Self {
        let owner = policy.child("Owner").and_then(|owner| owner.text_of("ID"));
        let given = policy.child("AccessControlList").into_iter().flat_map(|list| list.all("Grant"));
        let given: Vec<(&'static str, String)> = given.filter_map(grant).collect();
        let is_owner = |(header, grantee): &(&str, String)| {
            *header == FULL_CONTROL && owner.is_some_and(|owner| *grantee == format!("id=\"{owner}\""))
        };
        let mut grants = BTreeMap::new();
        if !given.iter().all(is_owner) {
            for (header, grantee) in given {
                let grantees: &mut String = grants.entry(header).or_default();
                if !grantees.is_empty() {
                    grantees.push_str(", ");
                }
                grantees.push_str(&grantee);
            }
        }
        Self { grants }
    }

    /// Only its owner has rights to the object.
    pub(super) fn is_private(&self) -> bool {
        self.grants.is_empty()
    }

    pub(super) fn add_to(&self, call: &mut Call) -> Result<()> {
        self.grants.iter().try_for_each(|(header, grantees)| call.header(header, grantees))
    }
}

/// For so long a bucket that did not answer whether it has ACLs is not asked again.
const UNANSWERED: Duration = Duration::from_secs(30);

const FULL_CONTROL: &str = "x-amz-grant-full-control";

/// The header of a grant, and its grantee there. WRITE means nothing for an object.
fn grant(grant: &Element) -> Option<(&'static str, String)> {
    let header = match grant.text_of("Permission")? {
        "FULL_CONTROL" => FULL_CONTROL,
        "READ" => "x-amz-grant-read",
        "READ_ACP" => "x-amz-grant-read-acp",
        "WRITE_ACP" => "x-amz-grant-write-acp",
        _ => return None,
    };
    let grantee = grant.child("Grantee")?;
    let named = [("ID", "id"), ("URI", "uri"), ("EmailAddress", "emailAddress")];
    let (element, name) = named.into_iter().find(|(element, _)| grantee.text_of(element).is_some())?;
    // Neither holds a quote: they are hexadecimal ids, URLs and addresses.
    Some((header, format!("{name}=\"{}\"", grantee.text_of(element)?.replace('"', ""))))
}

impl Bucket {
    /// GetObjectAcl, where the bucket has ACLs on. Who may not read an ACL cannot keep it, and hears of that once: the copy is private then,
    /// whatever new objects get, because its source may be.
    pub(super) async fn object_acl(&self, key: &str) -> Result<Option<Acl>> {
        match self.has_acls().await {
            Some(true) => {}
            Some(false) => return Ok(None),
            None => return Ok(Some(Acl::default())),
        }
        let call = Call::new(&self.core, Operation::GetObjectAcl, Method::GET).key(key).query("acl", "");
        match self.core.xml(&self.place, &call, "AccessControlPolicy").await {
            Ok(answer) => Ok(Some(Acl::of(&answer.body))),
            Err(refusal) if matches!(refusal.error.kind, ErrorKind::AccessDenied | ErrorKind::NotImplemented) => {
                self.acl_is_lost(&refusal.error);
                Ok(Some(Acl::default()))
            }
            Err(refusal) => Err(refusal.error),
        }
    }

    /// GetBucketOwnershipControls, asked once: ACLs are off where the bucket's owner owns all objects, and where the store does not know the
    /// question. `None` where it did not answer, or who asks may not know.
    async fn has_acls(&self) -> Option<bool> {
        // Who comes meanwhile waits for the answer.
        let mut known = self.acls.lock().await;
        if let Some((has, _)) = known.filter(|(_, until)| until.is_none_or(|until| Instant::now() < until)) {
            return has;
        }
        let (has, until) = match self.ownership().await {
            // AWS, "Controlling ownership of objects": a bucket of before April 2023 without the setting has ACLs on.
            Ok(None) => (Some(self.core.endpoint.is_aws()), None),
            Ok(Some(ownership)) => (Some(!ownership.is_empty() && ownership != "BucketOwnerEnforced"), None),
            // It said nothing of the bucket.
            Err(error) if error.kind.passes() || error.kind == ErrorKind::Protocol => {
                self.acl_is_lost(&error);
                (None, Some(Instant::now() + UNANSWERED))
            }
            Err(error) if error.kind == ErrorKind::AccessDenied => {
                if self.core.config.acl.is_some() {
                    self.acl_is_lost(&error);
                }
                (None, None)
            }
            Err(_) => (Some(false), None),
        };
        *known = Some((has, until));
        has
    }

    /// Said once: rights to one object may be others than to the next.
    pub(super) fn acl_is_lost(&self, error: &S3Error) {
        if !self.acl_lost.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                "what is renamed here may lose its ACL, which could not be read or set (s3:GetBucketOwnershipControls, s3:GetObjectAcl, s3:PutObjectAcl): {error}"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn acl(grants: &[(&str, &str)]) -> Acl {
        let grants: String = grants
            .iter()
            .map(|(grantee, permission)| {
                format!("<Grant><Grantee xmlns:xsi=\"x\" xsi:type=\"y\">{grantee}</Grantee><Permission>{permission}</Permission></Grant>")
            })
            .collect();
        let text = format!(
            "<AccessControlPolicy xmlns=\"http://s3.amazonaws.com/doc/2006-03-01/\"><Owner><ID>me</ID></Owner><AccessControlList>{grants}</AccessControlList></AccessControlPolicy>"
        );
        Acl::of(&Element::parse(text.as_bytes()).unwrap())
    }

    #[test]
    fn grants_become_headers() {
        let me = ("<ID>me</ID><DisplayName>I</DisplayName>", "FULL_CONTROL");
        assert!(acl(&[me]).is_private() && acl(&[]).is_private());
        let all = "<URI>http://acs.amazonaws.com/groups/global/AllUsers</URI>";
        let public = acl(&[me, (all, "READ"), ("<ID>other</ID>", "READ"), ("<ID>other</ID>", "WRITE"), ("<ID>other</ID>", "WRITE_ACP")]);
        let expected = [
            ("x-amz-grant-full-control", "id=\"me\""),
            ("x-amz-grant-read", "uri=\"http://acs.amazonaws.com/groups/global/AllUsers\", id=\"other\""),
            ("x-amz-grant-write-acp", "id=\"other\""),
        ];
        assert_eq!(public.grants, expected.map(|(header, grantees)| (header, grantees.to_owned())).into());
        // Somebody else's alone.
        assert!(!acl(&[("<ID>other</ID>", "FULL_CONTROL")]).is_private());
    }
}
