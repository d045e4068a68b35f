-- Append entries to the audit stream: those of no step that changes anything else here.
--
-- KEYS[1]  prefix of the farm's keys
-- ARGV[1]  limits of the stream (lib/audit.lua)
-- ARGV[2…] entries, payloads
-- include: time
-- include: audit
local limits = table.remove(ARGV, 1)
audit_note(KEYS[1], limits, ARGV, now_ms())
