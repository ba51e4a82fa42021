package foreign

import (
	"bufio"
	"bytes"
	"strings"

	"nvstore.dev/vpd/internal/spec"
)

// virtFirmware reads the JSON of version 2 that virt-firmware, python-uefivars
// and QEMU share. A spec is the same, with a format.
func virtFirmware(text []byte, _ *Options) (*result, error) {
	o, err := spec.Read(text)
	if err != nil {
		return nil, err
	}
	if err := o.Only("", "version", "variables"); err != nil {
		return nil, err
	}
	raw, ok := o.Get("version")
	if !ok || string(raw) != "2" {
		return nil, spec.Errorf("version", "want 2")
	}
	if _, ok := o.Get("variables"); !ok {
		return nil, spec.Errorf("variables", "missing")
	}
	r := &result{}
	r.spec.Add("format", "uefi")
	r.spec = append(r.spec, o[0:]...)
	r.notef("the layout is that of OVMF with a store of 4 MiB unless layout says otherwise: ovmf-4m, ovmf-2m or arm-virt")
	return r, nil
}

// uBoot reads name=value lines, as mkenvimage does: a value goes on in the next
// line, with a newline in it, behind a backslash at the line's end; a line that
// begins with a # is left out.
func uBoot(text []byte, _ *Options) (*result, error) {
	vars := spec.Object{}
	seen := map[string]bool{}
	s := bufio.NewScanner(bytes.NewReader(text))
	s.Buffer(nil, len(text)+1)
	line := ""
	for n := 1; s.Scan(); n++ {
		part := strings.TrimRight(s.Text(), "\r")
		if line == "" && (strings.HasPrefix(part, "#") || strings.TrimSpace(part) == "" || strings.HasPrefix(part, "Environment size:")) {
			continue
		}
		if body, ok := strings.CutSuffix(part, `\`); ok {
			line += body + "\n"
			continue
		}
		line += part
		name, value, ok := strings.Cut(line, "=")
		if !ok || name == "" {
			return nil, spec.Errorf("", "line %d: %q, want name=value", n, line)
		}
		if seen[name] {
			return nil, spec.Errorf("", "line %d: %s comes twice", n, name)
		}
		seen[name] = true
		vars.Add(name, value)
		line = ""
	}
	if line != "" {
		return nil, spec.Errorf("", "a backslash ends the last line")
	}
	r := &result{}
	r.spec.Add("format", "ubootenv")
	r.spec.Add("env_size", "0x2000")
	r.spec.Add("variables", vars)
	r.notef("the environment's size, env_size, isn't in the text: 0x2000 here; it is CONFIG_ENV_SIZE of the board")
	return r, nil
}
