//! Plain HTTP, unsigned: what any other program would see of a store.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use http::Method;

/// An answer.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub headers: BTreeMap<String, String>,
    pub body: Bytes,
}

impl Answer {
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
}

/// Sends one request and takes the whole answer.
pub fn send(method: Method, url: &str, headers: &[(&str, &str)], body: Vec<u8>) -> Result<Answer, reqwest::Error> {
    send_within(None, method, url, headers, body)
}

/// The same, with a limit for all of it.
pub fn send_within(
    limit: Option<Duration>,
    method: Method,
    url: &str,
    headers: &[(&str, &str)],
    body: Vec<u8>,
) -> Result<Answer, reqwest::Error> {
    // Some tests are futures already; a runtime cannot be entered twice on one thread.
    std::thread::scope(|scope| {
        let worker = scope.spawn(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let client = reqwest::Client::builder().no_proxy().build()?;
                let mut request = client.request(method, url).body(body);
                if let Some(limit) = limit {
                    request = request.timeout(limit);
                }
                for (name, value) in headers {
                    request = request.header(*name, *value);
                }
                let answer = request.send().await?;
                let headers = answer
                    .headers()
                    .iter()
                    .map(|(name, value)| (name.as_str().to_owned(), String::from_utf8_lossy(value.as_bytes()).into_owned()));
                Ok(Answer { status: answer.status().as_u16(), headers: headers.collect(), body: answer.bytes().await? })
            })
        });
        worker.join().unwrap()
    })
}

/// GET.
pub fn get(url: &str) -> Answer {
    send(Method::GET, url, &[], Vec::new()).unwrap()
}
