//! Access logs, line by line: S3's server access logs and CloudFront's standard logs, plain or gzip, told apart by what they hold.
//!
//! Sources: Amazon S3 User Guide, "Amazon S3 server access log format"; CloudFront Developer Guide, "Standard logging reference".

use std::collections::HashMap;
use std::io::{self, BufRead, BufReader, Read};

use flate2::bufread::MultiGzDecoder;
use jiff::Timestamp;
use percent_encoding::percent_decode_str;

use super::links;

/// Bytes of the longest line that is read; longer ones are skipped. CloudFront takes URLs of 8,192 bytes and 20 KB of headers,
/// each byte of which may be logged as five (`%2520`).
const LONGEST_LINE: usize = 256 << 10;

/// The body of a GET, or a part of one, as far as it was sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Delivery {
    /// When the request came (S3) or was answered (CloudFront).
    pub time: Timestamp,
    /// The request's id, the same where a line is delivered twice; empty where the log has none.
    pub request: String,
    /// Address and program of who asked, as logged.
    pub client: String,
    /// `s3://bucket/key`, or `https://host/path`.
    pub object: String,
    /// The link that was used: see [`links::PARAMETER`].
    pub link: Option<String>,
    /// Bytes of the object that were sent.
    pub bytes: u64,
    /// Which of its bytes they are.
    pub part: Part,
    /// The whole object's bytes.
    pub size: Option<u64>,
}

/// Which bytes of an object were sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// All.
    Whole,
    /// Those from this offset on.
    From(u64),
    /// S3 logs how many bytes a ranged GET sent, and not which.
    Unknown,
}

/// A line of a log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Line {
    /// Bytes of an object were sent.
    Delivery(Box<Delivery>),
    /// A request that sent none: another operation, a HEAD, 304 or an error; or a log's own header.
    Other,
    /// No line of an access log.
    Unknown,
}

/// Reads lines of either kind, in any order.
#[derive(Debug, Default)]
pub struct Parser {
    columns: Option<Columns>,
}

impl Parser {
    /// One line, without its newline.
    pub fn line(&mut self, line: &str) -> Line {
        let line = line.trim_end_matches('\r');
        if let Some(names) = line.strip_prefix("#Fields:") {
            self.columns = Some(Columns::named(names));
            return Line::Other;
        }
        let read = match &self.columns {
            _ if line.starts_with('#') || line.is_empty() => return Line::Other,
            Some(columns) if line.contains('\t') => columns.read(line),
            _ => of_s3(line),
        };
        read.unwrap_or(Line::Unknown)
    }
}

/// Hands each line of a log to `each`. Memory is bounded whatever is read: a gzip file is unpacked piece by piece.
///
/// # Errors
/// The file cannot be read, or is no whole gzip file; the lines before that have been handed out.
pub fn read(mut log: impl BufRead, each: &mut dyn FnMut(Line)) -> io::Result<()> {
    /// RFC 1952, "Member header".
    const GZIP: [u8; 2] = [0x1f, 0x8b];
    // A pipe may give one byte first.
    let mut head = Vec::new();
    log.by_ref().take(GZIP.len() as u64).read_to_end(&mut head)?;
    let is_gzip = head == GZIP;
    let log = io::Cursor::new(head).chain(log);
    if is_gzip { lines(BufReader::new(MultiGzDecoder::new(log)), each) } else { lines(log, each) }
}

fn lines(mut log: impl BufRead, each: &mut dyn FnMut(Line)) -> io::Result<()> {
    let mut parser = Parser::default();
    let mut line = Vec::new();
    loop {
        line.clear();
        if log.by_ref().take(LONGEST_LINE as u64).read_until(b'\n', &mut line)? == 0 {
            return Ok(());
        }
        if line.len() == LONGEST_LINE && line.last() != Some(&b'\n') {
            log.skip_until(b'\n')?;
            each(Line::Unknown);
            continue;
        }
        let text = String::from_utf8_lossy(&line);
        each(parser.line(text.strip_suffix('\n').unwrap_or(&text)));
    }
}

/// `None` for what is no line of S3's.
fn of_s3(line: &str) -> Option<Line> {
    let mut rest = line;
    let _owner = word(&mut rest)?;
    // What has a slash is no bucket, and would be taken for another one's key.
    let bucket = word(&mut rest).filter(|bucket| !bucket.contains('/'))?;
    let time = rest.strip_prefix('[')?;
    let (time, after) = time.split_once("] ")?;
    let time = Timestamp::strptime("%d/%b/%Y:%H:%M:%S %z", time).ok()?;
    rest = after;
    let address = word(&mut rest)?;
    let _requester = word(&mut rest)?;
    let request = word(&mut rest)?;
    let operation = word(&mut rest)?;
    let key = word(&mut rest)?;
    let uri = request_uri(&mut rest)?;
    let status = word(&mut rest)?;
    let _error = word(&mut rest)?;
    let bytes = number(word(&mut rest)?)?;
    let size = number(word(&mut rest)?)?;
    let delivered = operation == "REST.GET.OBJECT" && matches!(status, "200" | "206");
    let sent = bytes.unwrap_or(0);
    let part = match (status, size) {
        (_, Some(size)) if sent >= size => Part::Whole,
        // Neither has a figure for an empty object.
        ("200", None) if sent == 0 => Part::Whole,
        ("200", _) => Part::From(0),
        _ => Part::Unknown,
    };
    if !delivered || (sent == 0 && part != Part::Whole) {
        return Some(Line::Other);
    }
    let (_total_time, _turn_around) = (word(&mut rest)?, word(&mut rest)?);
    let _referrer = quoted(&mut rest);
    Some(Line::Delivery(Box::new(Delivery {
        time,
        request: present(request),
        client: format!("{address} {}", quoted(&mut rest)),
        object: format!("s3://{bucket}/{}", decoded(key)),
        link: link_of(uri.split_once('?').map_or("", |(_, query)| query.split(' ').next().unwrap_or_default())),
        bytes: size.map_or(sent, |size| sent.min(size)),
        part,
        size,
    })))
}

/// The next field.
fn word<'a>(rest: &mut &'a str) -> Option<&'a str> {
    let (word, after) = rest.split_once(' ').unwrap_or((rest, ""));
    *rest = after;
    Some(word).filter(|word| !word.is_empty())
}

/// The request line, which ends before a status: a quote of the client's does not end it.
fn request_uri<'a>(rest: &mut &'a str) -> Option<&'a str> {
    let Some(inner) = rest.strip_prefix('"') else { return word(rest) };
    let is_end = |at: &usize| {
        let status = inner[at + 2..].split(' ').next().unwrap_or_default();
        status == "-" || (status.len() == 3 && status.bytes().all(|byte| byte.is_ascii_digit()))
    };
    let at = inner.match_indices("\" ").map(|(at, _)| at).find(is_end)?;
    *rest = &inner[at + 2..];
    Some(&inner[..at])
}

/// A quoted field, without its quotes; a quote inside is not followed by a space. Empty where the line has ended.
fn quoted<'a>(rest: &mut &'a str) -> &'a str {
    match rest.strip_prefix('"') {
        None => word(rest).unwrap_or_default(),
        Some(inner) => {
            let (field, after) = inner.split_once("\" ").unwrap_or((inner.trim_end_matches('"'), ""));
            *rest = after;
            field
        }
    }
}

/// `-` is no number; anything else that is none makes the line no log line.
fn number(field: &str) -> Option<Option<u64>> {
    match field {
        "-" => Some(None),
        digits => digits.parse().ok().map(Some),
    }
}

fn present(field: &str) -> String {
    if field == "-" { String::new() } else { field.to_owned() }
}

/// A key as it is. S3 encodes it once or, where the request had it encoded, twice, and CloudFront does the same with a path. So a
/// key that has a `%41` of its own is taken for an `A` where it was encoded once.
fn decoded(field: &str) -> String {
    let once = percent_decode_str(field).decode_utf8_lossy().into_owned();
    let mut escapes = once.split('%').skip(1).peekable();
    let is_hex = |text: &str| text.as_bytes().first_chunk::<2>().is_some_and(|pair| pair.iter().all(u8::is_ascii_hexdigit));
    if escapes.peek().is_some() && escapes.all(is_hex) { percent_decode_str(&once).decode_utf8_lossy().into_owned() } else { once }
}

fn link_of(query: &str) -> Option<String> {
    let value = |pair: &str| pair.strip_prefix(links::PARAMETER)?.strip_prefix('=').map(str::to_owned);
    query.split('&').find_map(value).filter(|id| links::is_id(id))
}

/// Where CloudFront's columns are. Which there are, and in which order, is the distribution's configuration.
#[derive(Debug)]
struct Columns(HashMap<String, usize>);

impl Columns {
    fn named(names: &str) -> Self {
        Self(names.split_whitespace().enumerate().map(|(at, name)| (name.to_owned(), at)).collect())
    }

    /// `None` for what is no line of CloudFront's.
    fn read(&self, line: &str) -> Option<Line> {
        let fields: Vec<&str> = line.split('\t').collect();
        let field = |name: &str| {
            let field = *fields.get(*self.0.get(name)?)?;
            Some(field).filter(|field| !matches!(*field, "-" | ""))
        };
        let time = format!("{}T{}Z", field("date")?, field("time")?).parse().ok()?;
        let host = field("x-host-header").or_else(|| field("cs(Host)"))?;
        let path = field("cs-uri-stem")?;
        let status = field("sc-status")?;
        let amount = |name| field(name).map(str::parse::<u64>).transpose().ok();
        let sent = amount("sc-bytes")?.unwrap_or(0);
        let length = amount("sc-content-len")?;
        let (start, end) = (amount("sc-range-start")?, amount("sc-range-end")?);
        if field("cs-method")? != "GET" || !matches!(status, "200" | "206") {
            return Some(Line::Other);
        }
        // Of a 200 or 206, "Error" and these say that the client went away before the end.
        let result = field("x-edge-result-type");
        let detail = field("x-edge-detailed-result-type").or(result);
        let cut = [result, detail].contains(&Some("Error"))
            || detail.is_some_and(|detail| ["ClientCommError", "ClientHungUpRequest", "AbortedOrigin"].contains(&detail));
        let announced = match (status, start, end) {
            ("206", Some(start), Some(end)) => Some(end.checked_sub(start)?.saturating_add(1)),
            _ => length,
        };
        // sc-bytes counts the headers too: an answer that was cut lacks its last byte at least.
        let bytes = announced.map_or(sent, |announced| sent.min(announced.saturating_sub(u64::from(cut))));
        let part = match (status, start) {
            ("200", _) if !cut && announced.map_or(result.is_some(), |announced| bytes == announced) => Part::Whole,
            ("200", _) => Part::From(0),
            (_, Some(start)) => Part::From(start),
            _ => Part::Unknown,
        };
        if bytes == 0 && part != Part::Whole {
            return Some(Line::Other);
        }
        Some(Line::Delivery(Box::new(Delivery {
            time,
            request: field("x-edge-request-id").unwrap_or_default().to_owned(),
            client: format!("{} {}", field("c-ip").unwrap_or("-"), field("cs(User-Agent)").unwrap_or("-")),
            object: format!("https://{host}{}", decoded(path)),
            link: field("cs-uri-query").and_then(link_of),
            bytes,
            part,
            // A part's answer does not say how long the whole is.
            size: length.filter(|_| status == "200"),
        })))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::io::Write as _;

    use super::*;

    /// The examples of the S3 User Guide: a bucket's versioning, and an upload; then a GET as it is documented field by field.
    const S3: &str = concat!(
        "79a59df900b949e55d96a1e698fbacedfd6e09d98eacf8f8d5218e7cd47ef2be amzn-s3-demo-bucket1 [06/Feb/2019:00:00:38 +0000] 192.0.2.3 79a59df900b949e55d96a1e698fbacedfd6e09d98eacf8f8d5218e7cd47ef2be 3E57427F3EXAMPLE REST.GET.VERSIONING - \"GET /amzn-s3-demo-bucket1?versioning HTTP/1.1\" 200 - 113 - 7 - \"-\" \"S3Console/0.4\" - s9lzHYrFp76ZVxRcpX9+5cjAnEH2ROuNkd2BHfIa6UkFVdtjf5mKR3/eTPFvsiP/XV/VLi31234= SigV4 ECDHE-RSA-AES128-GCM-SHA256 AuthHeader amzn-s3-demo-bucket1.s3.us-west-1.amazonaws.com TLSV1.2 arn:aws:s3:us-west-1:123456789012:accesspoint/example-AP Yes us-east-1\n",
        "79a59df900b949e55d96a1e698fbacedfd6e09d98eacf8f8d5218e7cd47ef2be amzn-s3-demo-bucket1 [06/Feb/2019:00:01:57 +0000] 192.0.2.3 79a59df900b949e55d96a1e698fbacedfd6e09d98eacf8f8d5218e7cd47ef2be DD6CC733AEXAMPLE REST.PUT.OBJECT s3-dg.pdf \"PUT /amzn-s3-demo-bucket1/s3-dg.pdf HTTP/1.1\" 200 - - 4406583 41754 28 \"-\" \"S3Console/0.4\" - 10S62Zv81kBW7BB6SX4XJ48o6kpcl6LPwEoizZQQxJd5qDSCTLX0TgS37kYUBKQW3+bPdrg1234= SigV4 ECDHE-RSA-AES128-SHA AuthHeader amzn-s3-demo-bucket1.s3.us-west-1.amazonaws.com TLSV1.2 - Yes us-east-1\n",
        "79a59df900b949e55d96a1e698fbacedfd6e09d98eacf8f8d5218e7cd47ef2be amzn-s3-demo-bucket1 [06/Feb/2019:00:02:10 +0000] 192.0.2.7 - 7B4A0FABBEXAMPLE REST.GET.OBJECT photos/my%2520puppy.jpg \"GET /photos/my%20puppy.jpg?X-Amz-Expires=60&x-packmule-link=abcdefghijkl HTTP/1.1\" 206 - 2662992 3462992 70 10 \"http://www.example.com/\" \"Mozilla/5.0 \"quoted\" (X11)\" - s9lzHYrFp76ZVxRcpX9+5cjAnEH2ROuNkd2BHfIa6UkFVdtjf5mKR3/eTPFvsiP/XV/VLi31234= SigV4 ECDHE-RSA-AES128-GCM-SHA256 QueryString amzn-s3-demo-bucket1.s3.us-west-1.amazonaws.com TLSV1.2 - - us-east-1 some field of tomorrow\n",
    );

    /// The example of the CloudFront Developer Guide, and a part of a file to a client that went away.
    const CLOUDFRONT: &str = concat!(
        "#Version: 1.0\n",
        "#Fields: date time x-edge-location sc-bytes c-ip cs-method cs(Host) cs-uri-stem sc-status cs(Referer) cs(User-Agent) cs-uri-query cs(Cookie) x-edge-result-type x-edge-request-id x-host-header cs-protocol cs-bytes time-taken x-forwarded-for ssl-protocol ssl-cipher x-edge-response-result-type cs-protocol-version fle-status fle-encrypted-fields c-port time-to-first-byte x-edge-detailed-result-type sc-content-type sc-content-len sc-range-start sc-range-end\n",
        "2019-12-04\t21:02:31\tLAX1\t392\t192.0.2.100\tGET\td111111abcdef8.cloudfront.net\t/index.html\t200\t-\tMozilla/5.0%20(Windows%20NT%2010.0;%20Win64;%20x64)\t-\t-\tHit\tSOX4xwn4XV6Q4rgb7XiVGOHms_BGlTAC4KyHmureZmBNrjGdRLiNIQ==\td111111abcdef8.cloudfront.net\thttps\t23\t0.001\t-\tTLSv1.2\tECDHE-RSA-AES128-GCM-SHA256\tHit\tHTTP/2.0\t-\t-\t11040\t0.001\tHit\ttext/html\t78\t-\t-\n",
        "2019-12-04\t21:02:31\tLAX1\t5000\t192.0.2.100\tGET\td111111abcdef8.cloudfront.net\t/a%2520b.iso\t206\t-\tcurl/8\tExpires=1&x-packmule-link=abcdefghijkl\t-\tError\tk6WGMNkEzR5BEM_SaF47gjtX9zBDO2m349OY2an0QPEaUum1ZOLrow==\tdl.example.com\thttps\t23\t0.001\t-\tTLSv1.2\tECDHE-RSA-AES128-GCM-SHA256\tMiss\tHTTP/2.0\t-\t-\t11040\t0.001\tClientCommError\t-\t3000\t1000\t3999\n",
    );

    fn read_all(log: &[u8]) -> Vec<Line> {
        let mut lines = Vec::new();
        read(log, &mut |line| lines.push(line)).unwrap();
        lines
    }

    fn delivery(line: &Line) -> &Delivery {
        match line {
            Line::Delivery(delivery) => delivery,
            other => panic!("{other:?}"),
        }
    }

    fn gzip(text: &str) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(text.as_bytes()).unwrap();
        encoder.finish().unwrap()
    }

    #[test]
    fn lines_of_s3() {
        let lines = read_all(S3.as_bytes());
        assert_eq!(lines[..2], [Line::Other, Line::Other]);
        let expected = Delivery {
            time: "2019-02-06T00:02:10Z".parse().unwrap(),
            request: "7B4A0FABBEXAMPLE".into(),
            client: "192.0.2.7 Mozilla/5.0 \"quoted".into(),
            object: "s3://amzn-s3-demo-bucket1/photos/my puppy.jpg".into(),
            link: Some("abcdefghijkl".into()),
            bytes: 2_662_992,
            part: Part::Unknown,
            size: Some(3_462_992),
        };
        assert_eq!(delivery(&lines[2]), &expected);
        // A link that packmule did not make, an object without bytes, and quotes that the request line holds.
        let get = S3.lines().last().unwrap();
        assert_eq!(delivery(&Parser::default().line(&get.replace("abcdefghijkl", "1"))).link, None);
        let empty = delivery(&Parser::default().line(&get.replace("206 - 2662992 3462992", "200 - - 0"))).clone();
        assert_eq!((empty.bytes, empty.part, empty.size), (0, Part::Whole, Some(0)));
        let quoted = Parser::default().line(&get.replace("Expires=60", "a=\" b\"c"));
        assert_eq!(delivery(&quoted).bytes, 2_662_992);
    }

    #[test]
    fn lines_of_cloudfront() {
        let lines = read_all(CLOUDFRONT.as_bytes());
        assert_eq!(lines[..2], [Line::Other, Line::Other]);
        let page = delivery(&lines[2]);
        assert_eq!(
            (page.object.as_str(), page.part, page.bytes, page.size),
            ("https://d111111abcdef8.cloudfront.net/index.html", Part::Whole, 78, Some(78))
        );
        assert_eq!((page.time.to_string().as_str(), page.link.as_deref()), ("2019-12-04T21:02:31Z", None));
        let part = delivery(&lines[3]);
        assert_eq!((part.object.as_str(), part.link.as_deref()), ("https://dl.example.com/a b.iso", Some("abcdefghijkl")));
        assert_eq!((part.part, part.bytes, part.size), (Part::From(1000), 2999, None), "it was cut");
    }

    #[test]
    fn gzip_is_known_by_its_bytes() {
        // CloudFront's files are joined by cat, S3's and CloudFront's by whoever does that.
        let both = [gzip(CLOUDFRONT), gzip(S3)].concat();
        assert_eq!(read_all(&both), read_all([CLOUDFRONT, S3].concat().as_bytes()));
        let whole = gzip(S3);
        let mut lines = 0;
        let error = read(&whole[..whole.len() / 2], &mut |_| lines += 1).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        for empty in [&b""[..], &b"\x1f"[..]] {
            assert!(read_all(empty).iter().all(|line| *line == Line::Unknown));
        }
    }

    #[test]
    fn a_line_without_end_costs_no_memory() {
        let bomb = "x".repeat(8 * LONGEST_LINE) + "\n" + S3;
        let lines = read_all(&gzip(&bomb));
        assert_eq!((lines.len(), &lines[0]), (4, &Line::Unknown));
        let fits = "x".repeat(LONGEST_LINE - 1) + "\n" + S3;
        assert_eq!(read_all(fits.as_bytes()).len(), 4);
    }

    #[test]
    fn what_is_no_log_is_said() {
        for text in ["hello", "a b c", "a b [06/Feb/2019] c", "{\"json\": 1}", "a\tb\tc", "\u{0}"] {
            assert_eq!(Parser::default().line(text), Line::Unknown, "{text:?}");
        }
    }

    #[test]
    fn keys_are_decoded_once_or_twice() {
        for (field, key) in
            [("a+b", "a+b"), ("a%20b", "a b"), ("a%2520b", "a b"), ("100%25", "100%"), ("%25zz", "%zz"), ("%C3%A4", "\u{e4}"), ("%", "%")]
        {
            assert_eq!(decoded(field), key, "{field}");
        }
    }
}
