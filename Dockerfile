# For those who build images with an engine: `docker build --target ztunnel -t ztunnel .`, and likewise istiod-lite and waypoint.
# `cargo xtask image` makes the same without one.
FROM rust:1-bookworm AS build
WORKDIR /mesh
COPY . .
# Also sets up what the kernel programs are built with.
RUN cargo xtask image \
    && mkdir /programs \
    && cp target/release/ztunnel target/release/istiod-lite target/release/waypoint target/*/release/ztunnel-cni /programs/ \
    && strip /programs/*

FROM debian:bookworm-slim AS ztunnel
COPY --from=build /programs/ztunnel /programs/ztunnel-cni /usr/local/bin/
ENTRYPOINT ["/usr/local/bin/ztunnel"]

FROM debian:bookworm-slim AS istiod-lite
COPY --from=build /programs/istiod-lite /usr/local/bin/
USER 1337:1337
ENTRYPOINT ["/usr/local/bin/istiod-lite"]

FROM debian:bookworm-slim AS waypoint
COPY --from=build /programs/waypoint /usr/local/bin/
USER 1337:1337
ENTRYPOINT ["/usr/local/bin/waypoint"]
