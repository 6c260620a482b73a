"""TLS as a workload of the mesh speaks it."""

import ssl


def context(certificates, name):
    """For connections of `name`, whose certificate and key are in that directory beside the authority's."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_verify_locations(f"{certificates}/ca-cert.pem")
    context.load_cert_chain(f"{certificates}/{name}.pem", f"{certificates}/{name}.key")
    context.set_alpn_protocols(["h2"])
    return context
