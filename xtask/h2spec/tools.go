//go:build tools

// Package h2spec pins what `cargo xtask setup` builds: h2spec itself and, as it names none, the versions of what it uses.
package h2spec

import _ "github.com/summerwind/h2spec/cmd/h2spec"
