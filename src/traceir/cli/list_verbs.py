"""What `traceir models` and `traceir keys ...` do, which need neither index nor model; a list needs no numpy."""

from __future__ import annotations

import argparse
import json

from traceir import catalogue
from traceir.cli.terminal import split


def models(args: argparse.Namespace) -> int:
    print(json.dumps([known.as_json() for known in catalogue.KNOWN], indent=2) if args.json else catalogue.described())
    return 0


def keys_add(args: argparse.Namespace) -> int:
    from traceir.serve.keys import make_key

    limits = {"tenant": args.tenant, "days": args.days, "requests_per_minute": args.requests_per_minute}
    print(make_key(args.file, args.name, scopes=split(args.scopes), **limits))
    return 0


def keys_list(args: argparse.Namespace) -> int:
    from traceir.serve.keys import list_keys

    for key in list_keys(args.file):
        rest = f"tenant {key.tenant or '-'}  created {key.created}  expires {key.expires or 'never'}"
        print(f"{key.name:<24} {','.join(key.scopes):<11} {rest}")
    return 0


def keys_revoke(args: argparse.Namespace) -> int:
    from traceir.serve.keys import revoke_key

    revoke_key(args.file, args.name)
    print(f"revoked {args.name}")
    return 0
