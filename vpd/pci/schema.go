package pci

import (
	_ "embed"

	"nvstore.dev/vpd/internal/schema"
)

//go:embed schema.json
var ownSchema []byte

// Schema describes a spec.
func (format) Schema() []byte { return schema.Complete(Name, "PCI vital product data", ownSchema) }
