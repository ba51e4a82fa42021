package blobdir

import "encoding/asn1"

// arc is nvstore's own: a UUID-derived arc below Microsoft's base for such,
// so that it needs no registration and every number fits 31 bits.
var arc = asn1.ObjectIdentifier{1, 2, 840, 113556, 1, 8000, 2554, 64817, 25853, 8626, 17789, 42095, 794743, 15004100}

// Object identifiers of the structures (FORMAT.md, section 3).
var (
	oidHeader    = object(1, 1)
	oidRoot      = object(1, 2)
	oidSettled   = object(1, 3)
	oidDirectory = object(1, 4)
	oidKeySlots  = object(1, 5)
	oidChunkMap  = object(1, 6)
	oidFree      = object(1, 7)
	oidFreeTree  = object(1, 8)
	oidSealing   = object(2, 3)
)

// object returns the DER of arc.kind.n, tag and length included.
func object(kind, n int) []byte {
	oid := append(append(asn1.ObjectIdentifier{}, arc...), kind, n)
	der, err := asn1.Marshal(oid)
	if err != nil {
		panic("internal error: " + err.Error())
	}
	return der
}
