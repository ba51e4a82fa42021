// Package formats is the table of all formats of package vpd. To add one, add
// its package, its fixtures, and a line here. Where fields lie at fixed places,
// package vpd/internal/table makes the format of a table.
package formats

import (
	"slices"

	"nvstore.dev/vpd"
	"nvstore.dev/vpd/chassis"
	"nvstore.dev/vpd/chrp"
	"nvstore.dev/vpd/edid"
	"nvstore.dev/vpd/fru"
	"nvstore.dev/vpd/gvpd"
	"nvstore.dev/vpd/hat"
	"nvstore.dev/vpd/idprom"
	"nvstore.dev/vpd/internal/spec"
	"nvstore.dev/vpd/ipz"
	"nvstore.dev/vpd/keyword"
	"nvstore.dev/vpd/nic"
	"nvstore.dev/vpd/pci"
	"nvstore.dev/vpd/raw"
	"nvstore.dev/vpd/sfp"
	"nvstore.dev/vpd/smbios"
	"nvstore.dev/vpd/spd"
	"nvstore.dev/vpd/tlvinfo"
	"nvstore.dev/vpd/ubootenv"
	"nvstore.dev/vpd/uefi"
)

var table = []vpd.Format{
	pci.Format(),
	fru.Format(),
	tlvinfo.Format(),
	edid.Format(),
	hat.Format(),
	gvpd.Format(),
	nic.Format(),
	uefi.Format(),
	chrp.Format(),
	smbios.Format(),
	ipz.Format(),
	keyword.Format(),
	spd.Format(),
	sfp.Format(),
	ubootenv.Format(),
	chassis.Format(),
	idprom.Format(),
	raw.Format(),
}

// All returns the formats, in the order in which they are tried.
func All() []vpd.Format { return slices.Clone(table) }

// ByName returns the format of a name, or nil.
func ByName(name string) vpd.Format {
	for _, f := range table {
		if f.Name() == name {
			return f
		}
	}
	return nil
}

// Detect returns the format that the image is plainly of, or nil.
func Detect(image []byte) vpd.Format {
	for _, f := range table {
		if f.Detect(image) {
			return f
		}
	}
	return nil
}

// OfSpec returns the format that a spec names, or an error of kind
// vpd.ErrSpec.
func OfSpec(text []byte) (vpd.Format, error) {
	name, err := spec.Format(text)
	if err != nil {
		return nil, err
	}
	if f := ByName(name); f != nil {
		return f, nil
	}
	return nil, spec.Errorf("format", "unknown format %q", name)
}
