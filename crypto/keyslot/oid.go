package keyslot

import "encoding/asn1"

// Arc is the private arc of nvstore's object identifiers, made from a UUID
// under Microsoft's 1.2.840.113556.1.8000.2554, because every component then
// fits 32 bits, which an OID under 2.25 doesn't.
var Arc = asn1.ObjectIdentifier{1, 2, 840, 113556, 1, 8000, 2554, 64817, 25853, 8626, 17789, 42095, 794743, 15004100}

// Object identifiers of this package's structures and algorithms.
var (
	OIDKeySlots  = arc(1, 5) // the structure KeySlots
	OIDArgon2id  = arc(2, 1) // key derivation, parameters Argon2idParams
	OIDRawKey    = arc(2, 2) // key derivation from a raw key, parameters absent
	OIDSealedBox = arc(2, 3) // wrapping as in package seal
)

func arc(n ...int) asn1.ObjectIdentifier {
	return append(append(asn1.ObjectIdentifier{}, Arc...), n...)
}
