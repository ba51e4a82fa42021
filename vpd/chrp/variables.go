package chrp

import (
	"bytes"
	"fmt"

	"nvstore.dev/vpd/internal/form"
	"nvstore.dev/vpd/internal/spec"
)

// A variable of Open Firmware.
type variable struct {
	name  string
	value []byte
}

// variables are a system partition's data.
type variables struct {
	list  []variable
	end   int    // behind the empty string; at a fault, where it is
	fault string // why data isn't a list of variables
}

func readVariables(data []byte) (v variables) {
	seen := map[string]bool{}
	for {
		b := data[v.end:]
		n := bytes.IndexByte(b, 0)
		if n < 0 {
			v.fault = "its variables end without an empty string"
			return v
		}
		if n == 0 {
			v.end++
			return v
		}
		name, value, ok := bytes.Cut(b[:n], []byte{'='})
		switch {
		case !ok:
			v.fault = fmt.Sprintf("%s is no variable: it has no equals sign", spec.Brief(b[:n]))
		case !isName(string(name)):
			v.fault = fmt.Sprintf("%s is not a variable's name", spec.Brief(name))
		case seen[string(name)]:
			v.fault = fmt.Sprintf("the variable %s comes more than once", name)
		}
		if v.fault != "" {
			return v
		}
		seen[string(name)] = true
		v.list = append(v.list, variable{string(name), value})
		v.end += n + 1
	}
}

// isName: printable ASCII without an equals sign. Open Firmware itself allows
// 31 characters.
func isName(s string) bool {
	if s == "" || !spec.IsText([]byte(s)) {
		return false
	}
	return !bytes.ContainsRune([]byte(s), '=')
}

// show is how a value is written: text may have lines, as in nvramrc.
func show(value []byte) any {
	if isText(value) {
		return string(value)
	}
	return form.Hex(value)
}

func isText(b []byte) bool {
	for _, c := range b {
		if (c < 0x20 || c > 0x7e) && c != '\t' && c != '\n' && c != '\r' {
			return false
		}
	}
	return true
}

func encodeVariables(path string, raw []byte, limit int) ([]byte, error) {
	o, err := spec.ParseObject(path, raw)
	if err != nil {
		return nil, err
	}
	var out []byte
	for _, m := range o {
		path := spec.Join(path, m.Name)
		if !isName(m.Name) {
			return nil, spec.Errorf(path, "a name is printable ASCII without an equals sign")
		}
		v, err := spec.ParseValue(path, m.Value, limit)
		switch {
		case err != nil:
			return nil, err
		case v.Type == "text" && !isText(v.Bytes):
			return nil, spec.Errorf(path, "holds characters that are not printable ASCII; use type hex for other bytes")
		case bytes.IndexByte(v.Bytes, 0) >= 0:
			return nil, spec.Errorf(path, "holds a zero byte, which would end it")
		}
		out = append(out, m.Name...)
		out = append(out, '=')
		out = append(append(out, v.Bytes...), 0)
		if len(out) >= limit {
			return nil, spec.Errorf(path, "the variables take more than %d bytes", limit)
		}
	}
	return append(out, 0), nil
}

func trimZeros(b []byte) []byte { return bytes.TrimRight(b, "\x00") }
