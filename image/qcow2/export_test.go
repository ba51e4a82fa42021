package qcow2

// ParseAndEncode parses a header cluster and encodes what it understood.
func ParseAndEncode(b []byte) ([]byte, error) {
	h, err := parseHeader(b, "")
	if err != nil {
		return nil, err
	}
	return h.encode()
}

// HeaderLen returns the length of the fixed part of a valid header.
func HeaderLen(b []byte) int {
	h, err := parseHeader(b, "")
	if err != nil {
		return 0
	}
	return int(h.headerLen)
}

// Refcounts gives tests the accessors of a refcount block.
var (
	GetRefcount = getRefcount
	PutRefcount = putRefcount
)
