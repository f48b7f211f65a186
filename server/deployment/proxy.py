"""The reverse proxy's configuration: devices get the Fleet API, and nothing else.

Flower 1.41 serves three APIs on one port. Control (start runs, register nodes) and Runtime (act as
a ServerApp) ask for no password, so the SuperLink listens on 127.0.0.1 and nginx lets pass exactly
the calls that a registered SuperNode makes.
"""

from __future__ import annotations

from string import Template

from server.deployment.fleet import Fleet

__all__ = ["FLEET_CALLS", "REFUSALS", "nginx_config"]

REFUSALS = "refusals"
"""The log of what the server did not take from a device, a line each, with the reason."""

FLEET_CALLS = (
    "activate-node",
    "deactivate-node",
    "send-node-heartbeat",
    "pull-messages",
    "push-messages",
    "get-run",
    "get-fab",
    "push-object",
    "pull-object",
    "confirm-message-received",
)
"""Of /v1/fleet; register-node and unregister-node are left out: the server knows its devices."""


def nginx_config(fleet: Fleet) -> str:
    """Return nginx.conf. Everything that nginx writes stays in the fleet folder; no root needed."""
    host = f"{fleet.host} localhost 127.0.0.1" if fleet.host != "localhost" else "localhost"
    return _CONFIG.substitute(
        proxy=fleet.proxy_config.parent,
        refusals=fleet.log(REFUSALS),
        port=fleet.port,
        names=host,
        certificate=fleet.certificate,
        key=fleet.certificate_key,
        authority=fleet.authority,
        superlink=fleet.superlink_address,
        calls="|".join(FLEET_CALLS),
        passed=_PASSED.substitute(authority=fleet.authority),
    )


_PASSED = Template(
    """\
            limit_except POST { deny all; }
            proxy_pass https://superlink;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_set_header Host localhost;
            proxy_ssl_name localhost;
            proxy_ssl_server_name on;
            proxy_ssl_verify on;
            proxy_ssl_verify_depth 1;
            proxy_ssl_trusted_certificate "$authority";
            proxy_ssl_protocols TLSv1.3;
            proxy_connect_timeout 5s;
            proxy_read_timeout 120s;
            proxy_next_upstream off;
            # Updates pass through memory: nothing of them is written to a disk here.
            proxy_request_buffering off;
            proxy_buffering off;
"""
)

# Arrays travel in parts of at most 5 MiB, so a body is never much larger than that. The SuperLink
# answers a refused SuperNode without saying why, and logs no more: the reasons stand in the map.
_CONFIG = Template(
    """\
# Written by fedkn deploy init: devices reach the Fleet API here, and nothing else.
worker_processes 1;
pid "$proxy/nginx.pid";
# Of handshakes that failed, such as a device's with another authority, it tells from info on.
error_log stderr info;
events { worker_connections 1024; }
http {
    map "$$status $$upstream_status $$ssl_client_verify" $$refusal {
        default "";
        "400  " "plain text or no HTTP: this port speaks TLS alone";
        "~^400  (NONE|FAILED)" "no certificate of this fleet: $$ssl_client_verify";
        "~^403  " "no call of a device";
        "~^403 403" "no reply of this device's own: see the SuperLink's log";
        "~^413  " "a message of $$content_length bytes, more than client_max_body_size";
        "~^413 413" "more than it may store: see the SuperLink's log";
        "~^503  " "more calls or connections at once than a device makes";
        "~^401" "signed at $$http_flwr_timestamp, over 5 s ahead or 305 s behind; or by another";
        "~^412" "key not registered, or online already: see the SuperLink's log";
    }
    # Of a path no more than this: whoever calls chooses its length.
    map $$uri $$where { default ""; "~^(?<beginning>.{1,80})" $$beginning; }
    log_format refusals "$$time_iso8601 $$remote_addr $$where: $$status, $$refusal";
    access_log "$refusals" refusals if=$$refusal;
    server_tokens off;
    client_body_temp_path "$proxy/body";
    proxy_temp_path "$proxy/temp";
    fastcgi_temp_path "$proxy/temp";
    uwsgi_temp_path "$proxy/temp";
    scgi_temp_path "$proxy/temp";

    # By certificate: devices may share an address. The first part of a large model comes at once.
    limit_conn_zone $$ssl_client_fingerprint zone=connections:1m;
    limit_req_zone $$ssl_client_fingerprint zone=calls:1m rate=100r/s;
    limit_conn connections 16;
    limit_conn_status 503;
    limit_req zone=calls burst=400 nodelay;
    limit_req_status 503;

    upstream superlink {
        server $superlink;
        keepalive 32;
    }
    server {
        listen $port ssl;
        server_name $names;
        ssl_certificate "$certificate";
        ssl_certificate_key "$key";
        ssl_protocols TLSv1.2 TLSv1.3;
        ssl_ciphers ECDHE+AESGCM:ECDHE+CHACHA20;
        ssl_session_cache shared:tls:1m;
        ssl_session_tickets off;
        # Whoever shows no certificate of the fleet's is refused before a byte of a body is read.
        ssl_client_certificate "$authority";
        ssl_verify_client on;
        ssl_verify_depth 1;
        keepalive_timeout 75s;
        client_max_body_size 1m;
        client_header_timeout 10s;
        client_body_timeout 60s;
        send_timeout 60s;
        large_client_header_buffers 2 4k;
        lingering_time 5s;
        lingering_timeout 2s;

        # Arrays come here alone.
        location = /v1/fleet/push-object {
            client_max_body_size 16m;
$passed        }
        location ~ ^/v1/fleet/($calls)$$ {
$passed        }
        location / { return 403; }
        # As Flower's own errors are written, so that a SuperNode shows them.
        error_page 497 =400 @plain_text;
        location @plain_text {
            default_type application/json;
            return 400 '{"code": 400, "detail": "plain text: the server speaks TLS alone"}';
        }
        error_page 495 496 =400 @stranger;
        location @stranger {
            default_type application/json;
            return 400 '{"code": 400, "detail": "no certificate of this fleet: device.pem"}';
        }
    }
}
"""
)
