{{/* What all pods have in common. The restricted pod security standard is met by every one of them. */}}

{{- define "seamark.podSecurity" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
fsGroup: 65532
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "seamark.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{/* The head of a pod's spec. No pod talks to Kubernetes, so none gets a token. */}}
{{- define "seamark.podHead" -}}
automountServiceAccountToken: false
enableServiceLinks: false
securityContext:
  {{- include "seamark.podSecurity" . | nindent 2 }}
{{- with .Values.global.seamark.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- with .Values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* The head of a container. (root, tag) */}}
{{- define "seamark.containerHead" -}}
image: {{ include "seamark.image" . }}
imagePullPolicy: {{ .root.Values.global.seamark.image.pullPolicy }}
securityContext:
  {{- include "seamark.containerSecurity" .root | nindent 2 }}
{{- end }}

{{/* Secrets as files, each named as its setting is, and what is mounted besides. (root, secrets: which of them, user: of NATS) */}}
{{- define "seamark.secretsVolume" -}}
{{- $values := .root.Values }}
{{- $from := dict
  "nats-password" (dict "name" $values.global.seamark.nats.passwordsSecret "key" .user)
  "redis-url" $values.redis.urlSecret
  "postgres-url" $values.postgres.urlSecret
  "jwt-secret" $values.auth.jwtSecret
  "unsubscribe-secrets" $values.sending.unsubscribeSecret
  "storage-keys" $values.sending.storageKeysSecret
  "token" $values.test.tokenSecret
}}
- name: secrets
  projected:
    # Readable by the group that the pod's processes have, and by nobody else.
    defaultMode: 0440
    sources:
      {{- range $name := .secrets }}
      {{- with get $from $name }}
      - secret: {name: {{ .name }}, items: [{key: {{ .key }}, path: {{ $name }}}]}
      {{- end }}
      {{- end }}
{{- with $values.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "seamark.secretsMount" -}}
- {name: secrets, mountPath: /etc/seamark/secrets, readOnly: true}
{{- with .Values.extraVolumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "seamark.extraEnv" -}}
{{- with .Values.extraEnv }}
{{- toYaml . }}
{{- end }}
{{- end }}

{{/* Settings of a process that connects to NATS. (root, user) */}}
{{- define "seamark.natsEnv" -}}
- {name: SEAMARK_NATS_URL, value: {{ include "seamark.nats.urls" .root | quote }}}
- {name: SEAMARK_NATS_USER, value: {{ .user }}}
- {name: SEAMARK_NATS_PASSWORD_FILE, value: /etc/seamark/secrets/nats-password}
- {name: SEAMARK_NATS_MONITOR_URLS, value: {{ include "seamark.nats.monitors" .root | quote }}}
- {name: SEAMARK_PROFILE, value: production}
- {name: SEAMARK_PARTITIONS, value: {{ .root.Values.global.seamark.demand.partitions | quote }}}
- {name: SEAMARK_LOG_FORMAT, value: json}
{{- end }}

{{/* Where spans go. Nothing is said where none are made. `traces.url` is for gateways alone: seamark.gatewayEnv. */}}
{{- define "seamark.tracesEnv" -}}
{{- with .Values.traces }}
{{- if .endpoint -}}
- {name: SEAMARK_TRACES_ENDPOINT, value: {{ .endpoint | quote }}}
- {name: SEAMARK_TRACE_ONE_IN, value: {{ int .oneIn | quote }}}
- {name: SEAMARK_TRACE_FOLLOW_SECONDS, value: {{ int .followSeconds | quote }}}
{{- with .headersSecret }}
- {name: OTEL_EXPORTER_OTLP_HEADERS, valueFrom: {secretKeyRef: {name: {{ .name }}, key: {{ .key }}}}}
{{- end }}
{{- end }}
{{- end }}
{{- end }}

{{/* Files of `nats/` with the sizes that the demand needs. (root, servers, to: a folder that is not there: what makes it owns it) */}}
{{- define "seamark.sizeCommand" -}}
{{- $demand := .root.Values.global.seamark.demand -}}
- seamark
- topology
- size
- --rate={{ $demand.rate }}
- --record-bytes={{ int $demand.recordBytes }}
- --days={{ $demand.days }}
- --receipts-per-record={{ $demand.receiptsPerRecord }}
- --planned-share={{ $demand.plannedShare }}
- --users={{ int $demand.users }}
- --partitions={{ int $demand.partitions }}
- --servers={{ int .servers }}
- --write={{ .to }}
{{- end }}
