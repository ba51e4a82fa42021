package nvstore

// Conventional names of what machines keep (README, "Names").
const (
	TPMPermanent = "tpm/permanent"
	TPMVolatile  = "tpm/volatile"
	TPMSavestate = "tpm/savestate"
)

var aliases = map[string]string{
	"tpm-permanent-state": TPMPermanent,
	"tpm-volatile-state":  TPMVolatile,
	"tpm-savestate-state": TPMSavestate,
	"tpm-save-state":      TPMSavestate,
}

// Canonical returns the conventional name that a name is an alias of, or the
// name itself. nvtool applies it to every name on its command line; the
// functions of this package take names as they are.
func Canonical(name string) string {
	if c, ok := aliases[name]; ok {
		return c
	}
	return name
}
