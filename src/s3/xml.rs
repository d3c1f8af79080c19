//! S3's XML, read by local names alone: namespaces, missing fields and order differ from store to store.

use quick_xml::events::Event;

/// An element with its children; what S3 answers is small (a page of 1000 keys: some hundred KB).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Element {
    /// Local name, without a namespace prefix.
    pub name: String,
    /// Its text.
    pub text: String,
    /// Child elements in order.
    pub children: Vec<Element>,
}

/// Deeper than any S3 answer; bounds what a hostile one costs.
const DEEPEST: usize = 32;

impl Element {
    /// Reads a whole document.
    ///
    /// # Errors
    /// What came is no well-formed XML with one root element.
    pub fn parse(text: &[u8]) -> Result<Self, String> {
        let text = String::from_utf8_lossy(text);
        let mut reader = quick_xml::Reader::from_str(&text);
        let mut open: Vec<Element> = Vec::new();
        let mut root = None;
        loop {
            match reader.read_event().map_err(|error| error.to_string())? {
                Event::Start(start) => {
                    if open.len() >= DEEPEST || root.is_some() {
                        return Err("not S3's XML".to_owned());
                    }
                    open.push(Element { name: start.local_name().as_ref().to_owned(), ..Element::default() });
                }
                Event::Empty(start) => {
                    let element = Element { name: start.local_name().as_ref().to_owned(), ..Element::default() };
                    close(&mut open, &mut root, element)?;
                }
                Event::End(_) => {
                    let element = open.pop().ok_or("an end without a start")?;
                    close(&mut open, &mut root, element)?;
                }
                Event::Text(part) => {
                    if let Some(top) = open.last_mut() {
                        top.text.push_str(part.as_ref());
                    }
                }
                Event::CData(part) => {
                    if let Some(top) = open.last_mut() {
                        top.text.push_str(part.as_ref());
                    }
                }
                Event::GeneralRef(entity) => {
                    if let Some(top) = open.last_mut() {
                        let resolved = entity.resolve_char_ref().map_err(|error| error.to_string())?;
                        match resolved {
                            Some(character) => top.text.push(character),
                            None => {
                                top.text
                                    .push_str(quick_xml::escape::resolve_predefined_entity(entity.as_ref()).ok_or("an unknown entity")?);
                            }
                        }
                    }
                }
                Event::Eof => break,
                _ => {}
            }
        }
        match root {
            Some(root) if open.is_empty() => Ok(root),
            _ => Err("the XML ends early".to_owned()),
        }
    }

    /// The first child of that name.
    pub fn child(&self, name: &str) -> Option<&Element> {
        self.children.iter().find(|child| child.name == name)
    }

    /// All children of that name.
    pub fn all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a Element> {
        self.children.iter().filter(move |child| child.name == name)
    }

    /// A child's text; `None` where it is missing or empty.
    pub fn text_of(&self, name: &str) -> Option<&str> {
        self.child(name).map(|child| child.text.as_str()).filter(|text| !text.is_empty())
    }

    /// `true` in a child, in any case.
    pub fn is_true(&self, name: &str) -> bool {
        self.text_of(name).is_some_and(|text| text.trim().eq_ignore_ascii_case("true"))
    }
}

fn close(open: &mut [Element], root: &mut Option<Element>, mut element: Element) -> Result<(), String> {
    // White space between elements is layout; in a leaf it is the value (a key may be a space).
    if !element.children.is_empty() {
        element.text.clear();
    }
    match open.last_mut() {
        Some(parent) => parent.children.push(element),
        None if root.is_none() => *root = Some(element),
        None => return Err("two root elements".to_owned()),
    }
    Ok(())
}

/// The root element's name as written, found without reading the document; `None` for what does not begin as XML.
pub fn root_name(text: &[u8]) -> Option<&[u8]> {
    let mut rest = text.strip_prefix(b"\xef\xbb\xbf").unwrap_or(text).trim_ascii_start();
    while rest.starts_with(b"<?") || rest.starts_with(b"<!") {
        let end = rest.iter().position(|byte| *byte == b'>')?;
        rest = rest.get(end + 1..)?.trim_ascii_start();
    }
    let name = rest.strip_prefix(b"<")?;
    let end = name.iter().position(|byte| byte.is_ascii_whitespace() || matches!(byte, b'>' | b'/'))?;
    let name = name.get(..end)?;
    Some(name.rsplit(|byte| *byte == b':').next().unwrap_or(name))
}

/// Text as element content.
pub fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            // XML readers turn a bare CR into LF.
            '\r' => out.push_str("&#13;"),
            other => out.push(other),
        }
    }
    out
}

/// True when XML 1.0 can carry the text unchanged: no control characters, no U+FFFE and U+FFFF.
pub fn can_carry(text: &str) -> bool {
    !text.chars().any(|c| c.is_control() || c == '\u{fffe}' || c == '\u{ffff}')
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn namespaces_entities_and_spaces() {
        let root = Element::parse(b"<?xml version=\"1.0\"?>\n<s3:R xmlns:s3=\"x\">\n <Key>a &amp; b&#x9;</Key><Key> </Key><E/><T>True</T><C><![CDATA[<x>]]></C></s3:R>").unwrap();
        assert_eq!(root.name, "R");
        assert_eq!(root.all("Key").map(|e| e.text.as_str()).collect::<Vec<_>>(), ["a & b\t", " "]);
        assert!(root.is_true("T") && root.text_of("E").is_none());
        assert_eq!(root.text_of("C"), Some("<x>"));
    }

    #[test]
    fn what_is_no_xml_is_an_error() {
        for text in
            [&b"not xml"[..], b"<a><b></a>", b"<a>", b"", b"<a/><b/>", b"<html><body><p>Log in<br></body></html>", &b"<a>".repeat(100)]
        {
            assert!(Element::parse(text).is_err(), "{}", String::from_utf8_lossy(text));
        }
    }

    #[test]
    fn roots() {
        assert_eq!(root_name(b"\n<?xml version=\"1.0\"?> <!-- x --><s3:Error xmlns=\"y\">"), Some(&b"Error"[..]));
        assert_eq!(root_name(b"<R/>"), Some(&b"R"[..]));
        assert_eq!(root_name(b""), None);
        assert_eq!(root_name(b"{}"), None);
    }

    #[test]
    fn escapes() {
        assert_eq!(escape("a<b>&\"\r"), "a&lt;b&gt;&amp;&quot;&#13;");
        assert!(can_carry("é/ü") && !can_carry("a\u{1}") && !can_carry("a\nb"));
    }

    proptest::proptest! {
        #[test]
        fn text_comes_back(text in "\\PC{0,40}") {
            let document = format!("<a><b>{}</b></a>", escape(&text));
            proptest::prop_assert_eq!(&Element::parse(document.as_bytes()).unwrap().children[0].text, &text);
        }

        #[test]
        fn any_bytes_are_answered(bytes in proptest::collection::vec(0u8..=255, 0..200)) {
            let _ = Element::parse(&bytes);
        }
    }
}
