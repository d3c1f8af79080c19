"""Prints the GET link that botocore makes for the inputs, to compare with ours byte for byte.

usage: presign.py ENDPOINT REGION BUCKET KEY EXPIRES [NAME=VALUE ...]

Keys come from the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN). ENDPOINT may be "" for AWS.
PRESIGN_DATE=20260101T000000Z signs as of that time; PRESIGN_STYLE is path (default) or virtual; PRESIGN_VERSION is s3v4 (default) or s3,
whose time is PRESIGN_DATE too. NAME=VALUE are query parameters, response-content-disposition=… for example.
"""
import datetime
import os
import sys
import time

import botocore.auth
import botocore.compat
import botocore.session
from botocore.config import Config

PARAMETERS = {
    "response-content-disposition": "ResponseContentDisposition",
    "response-content-type": "ResponseContentType",
    "response-cache-control": "ResponseCacheControl",
    "response-content-encoding": "ResponseContentEncoding",
    "response-content-language": "ResponseContentLanguage",
    "versionId": "VersionId",
    "partNumber": "PartNumber",
}


def freeze(stamp):
    moment = datetime.datetime.strptime(stamp, "%Y%m%dT%H%M%SZ").replace(tzinfo=datetime.timezone.utc)

    class Frozen(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return moment.astimezone(tz) if tz else moment.replace(tzinfo=None)

        @classmethod
        def utcnow(cls):
            return moment.replace(tzinfo=None)

    for module in (botocore.auth, botocore.compat):
        if hasattr(module, "get_current_datetime"):
            module.get_current_datetime = lambda remove_tzinfo=True: moment.replace(tzinfo=None) if remove_tzinfo else moment
        if isinstance(getattr(module, "datetime", None), type(datetime)):
            module.datetime.datetime = Frozen
    time.time = moment.timestamp


def main():
    endpoint, region, bucket, key, expires, *extra = sys.argv[1:]
    if "PRESIGN_DATE" in os.environ:
        freeze(os.environ["PRESIGN_DATE"])
    config = Config(
        signature_version=os.environ.get("PRESIGN_VERSION", "s3v4"),
        s3={"addressing_style": os.environ.get("PRESIGN_STYLE", "path")},
    )
    client = botocore.session.get_session().create_client("s3", region_name=region, endpoint_url=endpoint or None, config=config)
    query = dict(pair.split("=", 1) for pair in extra)
    named = {PARAMETERS[name]: value for name, value in query.items() if name in PARAMETERS}
    own = {name: value for name, value in query.items() if name not in PARAMETERS}
    if own:
        # Parameters that the service model does not know: added before signing, as an application would.
        def add(params, **_):
            params["query_string"] = {**params.get("query_string", {}), **own}

        client.meta.events.register("before-call.s3.GetObject", add)
        client.meta.events.register("before-sign.s3.GetObject", lambda request, **_: request.params.update(own))
    print(client.generate_presigned_url("get_object", Params={"Bucket": bucket, "Key": key, **named}, ExpiresIn=int(expires)))


main()
