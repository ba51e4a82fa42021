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

// A MetaSet is a metaSet, with kinds as numbers.
type MetaSet struct{ m metaSet }

func (s *MetaSet) Get(c uint64) int    { return int(s.m.get(c)) }
func (s *MetaSet) Set(c uint64, k int) { s.m.set(c, metaKind(k)) }
func (s *MetaSet) Del(c uint64)        { s.m.del(c) }
func (s *MetaSet) Blocks() int         { return len(s.m.tables.blocks) + len(s.m.rest.blocks) }
